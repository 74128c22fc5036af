/* Ends badly: an exception with an empty IDT. The VMM must report it and end with an error. */
#include "common/bare.h"

void bare_main(void) {
    struct {
        u16 limit;
        reg base;
    } __attribute__((packed)) empty = {0, 0};
    say("about to triple fault\n");
    asm volatile("lidt %0; ud2" ::"m"(empty));
}
