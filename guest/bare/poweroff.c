/* Powers off as the ACPI tables say. */
#include "common/power.h"

void bare_main(void) {
    say("powering off\n");
    power_off();
    for (u32 i = 0; i < 100000000; i++)
        pause();
    die("still on");
}
