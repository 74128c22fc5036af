/* The local APIC by its MMIO page (SDM 3A, chapter 11). 64-bit programs see it uncached at its physical address. */
#ifndef APIC_H
#define APIC_H
#include "bare.h"

enum {
    APIC_ID = 0x20, APIC_VERSION = 0x30, APIC_TPR = 0x80, APIC_PPR = 0xa0, APIC_EOI = 0xb0, APIC_LDR = 0xd0, APIC_DFR = 0xe0,
    APIC_SPURIOUS = 0xf0, APIC_ISR = 0x100, APIC_TMR = 0x180, APIC_IRR = 0x200, APIC_ESR = 0x280, APIC_ICR = 0x300,
    APIC_ICR_HIGH = 0x310, APIC_LVT_TIMER = 0x320, APIC_LVT_THERMAL = 0x330, APIC_LVT_PERFORMANCE = 0x340,
    APIC_LVT_LINT0 = 0x350, APIC_LVT_LINT1 = 0x360, APIC_LVT_ERROR = 0x370, APIC_INITIAL = 0x380, APIC_CURRENT = 0x390,
    APIC_DIVIDE = 0x3e0,
};
enum { APIC_BASE_MSR = 0x1b, APIC_BASE_X2 = 1 << 10, APIC_BASE_ON = 1 << 11, TSC_DEADLINE_MSR = 0x6e0, X2APIC_MSR = 0x800 };
enum { LVT_MASKED = 1 << 16, TIMER_PERIODIC = 1 << 17, TIMER_DEADLINE = 2 << 17 };
/* Interrupt command: level asserted, shorthands, delivery modes. */
enum {
    ICR_ASSERT = 1 << 14, ICR_SELF = 1 << 18, ICR_ALL = 2 << 18, ICR_OTHERS = 3 << 18, ICR_LOGICAL = 1 << 11,
    ICR_LOWEST = 1 << 8, ICR_NMI = 4 << 8, ICR_INIT = 5 << 8, ICR_STARTUP = 6 << 8,
};

static inline u32 apic_read(u32 at) { return *(volatile u32 *)(0xfee00000ul + at); }
static inline void apic_write(u32 at, u32 value) { *(volatile u32 *)(0xfee00000ul + at) = value; }
static inline u32 apic_id(void) { return apic_read(APIC_ID) >> 24; }
static inline void apic_eoi(void) { apic_write(APIC_EOI, 0); }
/* Enables the APIC, spurious interrupts on vector 0xff. */
static inline void apic_on(void) { apic_write(APIC_SPURIOUS, 0x1ff); }
static inline void apic_send(u32 to, u32 command) {
    apic_write(APIC_ICR_HIGH, to << 24);
    apic_write(APIC_ICR, command);
}

#endif
