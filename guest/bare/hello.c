/* The smallest program: says hello, reads what the loader told it, ends well. */
#include "common/bare.h"

void bare_main(void) {
    u32 *info = (u32 *)(reg)boot_info;
    say("hello from a bare processor\n");
    check("multiboot magic", boot_magic, 0x2badb002);
    check("multiboot memory fields", info[0] & 1, 1);
    check("more than 1 MiB of upper memory", info[2] >= 1024, 1);
    check("long mode is active", rdmsr(0xc0000080) >> 10 & 1, 1);
}
