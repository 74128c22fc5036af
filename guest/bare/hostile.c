/* A guest that pokes at everything: every port and a sample of the MMIO hole, read and written, from a fixed seed; what
 * ends the machine by design is left out. Afterwards the program and its processor must still be there. */
#include "common/acpi.h"
#include "common/apic.h"

static u32 seed = 20240607;
static u32 dice(void) {
    seed = seed * 1664525 + 1013904223;
    return seed >> 8 ^ seed << 13;
}

static struct {
    u32 first, last;
} spared[24] = {
    {0xf4, 0xf7},   /* isa-debug-exit */
    {0x64, 0x64},   /* keyboard controller: reset line */
    {0x92, 0x92},   /* fast reset */
    {0xcf9, 0xcf9}, /* reset control */
    {0x3f8, 0x3f8}, /* what is printed, and the divisor */
};
static u32 spared_count = 5;

static void spare(u32 first, u32 count) {
    if (!first || spared_count == ARRAY_SIZE(spared))
        return;
    spared[spared_count].first = first;
    spared[spared_count++].last = first + count - 1;
}

static int is_spared(u32 port, u32 size) {
    for (u32 i = 0; i < spared_count; i++)
        if (port <= spared[i].last && port + size > spared[i].first)
            return 1;
    return 0;
}

static void spare_power(void) {
    const u8 *fadt = acpi_table("FACP");
    if (fadt) {
        u32 length = acpi_u32(fadt + 4);
        spare(acpi_u32(fadt + 48), 2);
        spare(acpi_u32(fadt + 56), 4);
        spare(acpi_u32(fadt + 64), 4);
        if (length >= 129)
            spare((u32)acpi_u64(fadt + 120), 4);
        if (length >= 268) {
            spare((u32)acpi_u64(fadt + 248), 4);
            spare((u32)acpi_u64(fadt + 260), 4);
        }
    }
    if (under_tcg()) {
        spare(0x510, 12);     /* fw_cfg, which writes anywhere in memory by design */
        spare(0xcf8, 8);      /* the chipset's registers switch RAM off */
        spare(0x20, 2);       /* interrupt controllers */
        spare(0xa0, 2);
        spare(0x3f8, 8);      /* its serial port asserts byte accesses */
        spare(0x600, 0x80);   /* power management */
        spare(0xae00, 0x100); /* hot plug */
        spare(0xaf00, 0x100);
    }
}

static void ports(void) {
    u32 sum = 0, touched = 0;
    for (u32 round = 0; round < 2; round++)
        for (u32 port = 0; port < 0x10000; port++) {
            u32 size = round ? 1u << dice() % 3 : 1;
            if (port + size > 0x10000 || is_spared(port, size))
                continue;
            u32 value = dice();
            switch (size) {
            case 1:
                sum += in8(port);
                out8(port, value);
                break;
            case 2: {
                u16 got;
                asm volatile("inw %w1, %0" : "=a"(got) : "Nd"(port));
                sum += got;
                asm volatile("outw %w0, %w1" ::"a"(value), "Nd"(port));
                break;
            }
            default:
                sum += in32(port);
                out32(port, value);
            }
            touched++;
        }
    /* The serial port again as the runtime wants it. */
    out8(0x3fb, 3);
    out8(0x3f9, 0);
    out8(0x3fa, 7);
    out8(0x3fc, 3);
    check("alive behind all ports", touched > 0x1f000, 1);
    (void)sum;
}

static void strings(void) {
    static u8 buffer[4096] __attribute__((aligned(4096)));
    reg count = 512;
    void *at = buffer;
    asm volatile("cld; rep insb" : "+D"(at), "+c"(count) : "d"(0x1234) : "memory");
    check("a string from a port that is not there is all ones", buffer[0] + buffer[511], 0x1fe);
    count = 512;
    at = buffer;
    asm volatile("rep outsb" : "+S"(at), "+c"(count) : "d"(0x1234) : "memory");
    check("a string to it", count, 0);
    PROBE(ins_fault, "mov $1, %edi; shl $46, %rdi; mov $0x1234, %edx; mov $4, %ecx", "rep insl");
    run_kernel(ins_fault, 0);
    check_trap("a string into memory that is not there", PF, 2, (reg)ins_fault_at);
}

/* Addresses at which QEMU or Posada have RAM, or the local APIC, whose commands stop this processor. */
static int is_local(u32 address) { return address >= 0xfee00000 && address < 0xfef00000; }

static void memory_holes(void) {
    u32 touched = 0, sum = 0;
    for (u64 page = 0xc0000000; page < 0x100000000; page += 8 * 4096) {
        u32 at = (u32)page + dice() % (8 * 4096 - 16), kind = dice() % 6;
        if (kind != 5)
            at &= ~7u;
        if (is_local(at))
            continue;
        reg address = at;
        switch (kind) {
        case 0: sum += *(volatile u8 *)address; *(volatile u8 *)address = dice(); break;
        case 1: sum += *(volatile u16 *)address; *(volatile u16 *)address = dice(); break;
        case 2: sum += *(volatile u32 *)address; *(volatile u32 *)address = dice(); break;
        case 3: sum += *(volatile u64 *)address; *(volatile u64 *)address = dice(); break;
        case 4: __atomic_fetch_xor((volatile u32 *)address, dice(), __ATOMIC_SEQ_CST); break;
        default: sum += *(volatile u64 *)(address + 3); *(volatile u32 *)(address + 1) = dice(); break;
        }
        touched++;
    }
    /* Every register of the I/O APIC's page. */
    for (u32 i = 0; i < 4096; i += 4)
        sum += *(volatile u32 *)(reg)(0xfec00000 + i);
    check("alive behind the holes", touched > 30000, 1);
    asm volatile("movdqu (%1), %%xmm0; pmovmskb %%xmm0, %0" : "=r"(sum) : "r"(0xd0000000ul));
    check("a wide read of a hole is all ones", sum, 0xffff);
    if (under_tcg()) {
        skip("code in a hole", "QEMU ends there");
        return;
    }
    /* A hole reads as all ones, and ff ff is no instruction. */
    run_kernel((void *)0xd0000000ul, 0);
    check("code in a hole traps", last.vector == UD || last.vector == GP || last.vector == PF, 1);
}

static void configuration_space(void) {
    if (under_tcg()) {
        skip("random writes to PCI configuration space", "the chipset's registers switch RAM off");
        return;
    }
    for (int i = 0; i < 4000; i++) {
        out32(0xcf8, 0x80000000u | (dice() & 0xfffffc));
        if (i & 1)
            out32(0xcfc, dice());
        else
            in32(0xcfc);
    }
    out32(0xcf8, 0x80fff800);
    check("a function that is not there is all ones", in32(0xcfc), 0xffffffff);
}

static u32 text_sum(void) {
    u32 sum = 0;
    for (const u32 *at = (u32 *)0x100000; at < (u32 *)bare_main; at++)
        sum = sum * 31 + *at;
    return sum;
}

static volatile u32 ticks;
static void tick(struct frame *f) {
    (void)f;
    ticks++;
    apic_eoi();
}

void bare_main(void) {
    u32 before = text_sum();
    spare_power();
    ports();
    strings();
    memory_holes();
    configuration_space();
    check("the program is whole", text_sum(), before);
    TRAPS(still_traps, "exceptions arrive", "", "ud2", UD, 0);
    apic_on();
    handlers[0x60] = tick;
    apic_write(APIC_LVT_TIMER, 0x60);
    apic_write(APIC_INITIAL, 1000);
    while (!ticks)
        wait_interrupt();
    check("timers arrive", ticks, 1);
}
