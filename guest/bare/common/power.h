/* Ways to end or restart the machine. */
#ifndef POWER_H
#define POWER_H
#include "acpi.h"

/* The value for S5 in the DSDT: the first of the package named _S5_. */
static inline int sleep_type(const u8 *fadt) {
    const u8 *dsdt = (const u8 *)(reg)acpi_u32(fadt + 40);
    u32 length;
    if (!dsdt)
        dsdt = (const u8 *)acpi_u64(fadt + 140);
    length = acpi_u32(dsdt + 4);
    for (u32 i = 36; i + 8 < length; i++)
        if (acpi_u32(dsdt + i) == 0x5f35535f) {
            /* PackageOp, its length (one byte here), the number of elements, the first: a byte behind a prefix, 0 or 1. */
            const u8 *first = dsdt + i + 7;
            return first[0] == 0x0a ? first[1] : first[0];
        }
    return -1;
}

static inline void power_off(void) {
    const u8 *fadt = acpi_table("FACP");
    if (!fadt)
        die("no FADT");
    int type = sleep_type(fadt);
    if (type < 0)
        die("no _S5_ in the DSDT");
    /* Hardware-reduced: flag bit 20 and the sleep control register; else PM1a control. */
    if (acpi_u32(fadt + 112) >> 20 & 1)
        out8(acpi_u64(fadt + 248), type << 2 | 1 << 5);
    else
        asm volatile("outw %w0, %w1" ::"a"(type << 10 | 1 << 13), "d"(acpi_u32(fadt + 64)));
}

static inline void reset_by_acpi(void) {
    const u8 *fadt = acpi_table("FACP");
    if (!fadt || !(acpi_u32(fadt + 112) >> 10 & 1))
        die("no reset register in the FADT");
    out8(acpi_u64(fadt + 120), fadt[128]);
}

#endif
