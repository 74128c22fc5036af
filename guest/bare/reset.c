/* Resets by the way that the command line names: acpi, keyboard or cf9. Started again, it does the same again. */
#include "common/power.h"

void bare_main(void) {
    say("up\n");
    if (told("keyboard"))
        out8(0x64, 0xfe);
    else if (told("cf9")) {
        out8(0xcf9, 2);
        out8(0xcf9, 6);
    } else if (told("acpi"))
        reset_by_acpi();
    else
        die("the command line names no way");
    for (u32 i = 0; i < 100000000; i++)
        pause();
    die("still on");
}
