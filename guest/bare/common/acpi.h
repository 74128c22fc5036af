/* The few things bare programs want from the ACPI tables. Everything is below 1 GiB, mapped to itself. */
#ifndef ACPI_H
#define ACPI_H
#include "bare.h"

static inline u32 acpi_u32(const u8 *at) { return *(const volatile u32 *)at; }
static inline u64 acpi_u64(const u8 *at) { return *(const volatile u64 *)at; }

/* The table with this signature, or 0. */
static inline const u8 *acpi_table(const char *signature) {
    for (const u8 *at = (const u8 *)0xe0000; at < (const u8 *)0x100000; at += 16) {
        if (acpi_u64(at) != 0x2052545020445352) /* "RSD PTR " */
            continue;
        int wide = at[15] >= 2 && acpi_u64(at + 24);
        const u8 *root = (const u8 *)(wide ? acpi_u64(at + 24) : acpi_u32(at + 16));
        u32 length = acpi_u32(root + 4);
        for (u32 i = 36; i < length; i += wide ? 8 : 4) {
            const u8 *table = (const u8 *)(wide ? acpi_u64(root + i) : acpi_u32(root + i));
            if (acpi_u32(table) == acpi_u32((const u8 *)signature))
                return table;
        }
    }
    return 0;
}

#endif
