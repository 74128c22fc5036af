/* Never ends and takes no interrupts. The VMM must still stop when told to. */
#include "common/bare.h"

void bare_main(void) {
    interrupts_off();
    say("spinning\n");
    for (;;)
        ;
}
