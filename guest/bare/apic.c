/* The local APIC (SDM 3A, chapter 11): registers, priorities, self IPIs, NMI, the timer's three modes, x2APIC. */
#include "common/apic.h"

enum { LOW = 0x41, MIDDLE = 0x61, HIGH = 0x91, TIMER = 0xa0, SPURIOUS = 0xff };
static volatile u32 order[32], arrived;
static volatile u32 isr_inside, irr_inside, ppr_inside;
static int x2;

static u32 get(u32 at) { return x2 ? (u32)rdmsr(X2APIC_MSR + at / 16) : apic_read(at); }
static void put(u32 at, u32 value) {
    if (x2)
        wrmsr(X2APIC_MSR + at / 16, value);
    else
        apic_write(at, value);
}
static void eoi(void) { put(APIC_EOI, 0); }
static void send_self(u32 vector) {
    if (x2)
        wrmsr(X2APIC_MSR + APIC_ICR / 16, ICR_SELF | ICR_ASSERT | vector);
    else
        apic_write(APIC_ICR, ICR_SELF | ICR_ASSERT | vector);
}
static int bit_of(u32 bank, u32 vector) { return get(bank + vector / 32 * 16) >> (vector & 31) & 1; }

static void interrupt(struct frame *f) {
    u32 vector = f->vector;
    if (arrived < ARRAY_SIZE(order))
        order[arrived] = vector;
    arrived++;
    isr_inside = bit_of(APIC_ISR, vector);
    irr_inside = bit_of(APIC_IRR, vector);
    ppr_inside = get(APIC_PPR);
    eoi();
}

/* In the middle interrupt the low one must wait, the high one comes at once. */
static void nesting(struct frame *f) {
    (void)f;
    order[arrived++] = MIDDLE;
    send_self(LOW);
    send_self(HIGH);
    asm volatile("sti; nop; nop; nop; cli" ::: "memory");
    order[arrived++] = 1;
    eoi();
}

static void let_in(void) { asm volatile("sti; nop; nop; nop; cli" ::: "memory"); }

static void registers(void) {
    check("the version says how many LVT entries there are", (get(APIC_VERSION) >> 16 & 0xff) >= 3, 1);
    put(APIC_SPURIOUS, SPURIOUS);
    check("a disabled APIC masks its LVT", get(APIC_LVT_TIMER) & LVT_MASKED, LVT_MASKED);
    put(APIC_LVT_TIMER, TIMER);
    check("and keeps it masked", get(APIC_LVT_TIMER) & LVT_MASKED, LVT_MASKED);
    put(APIC_SPURIOUS, 0x100 | SPURIOUS);
    check("the spurious register reads back", get(APIC_SPURIOUS), 0x100 | SPURIOUS);
    static const u16 lvts[] = {APIC_LVT_LINT0, APIC_LVT_LINT1, APIC_LVT_ERROR, APIC_LVT_TIMER};
    for (u32 i = 0; i < ARRAY_SIZE(lvts); i++) {
        put(lvts[i], LVT_MASKED | 0x55);
        check("an LVT entry reads back", get(lvts[i]), LVT_MASKED | 0x55);
    }
    put(APIC_DIVIDE, 0xb);
    check("the divide register reads back", get(APIC_DIVIDE), 0xb);
}

static void priorities(void) {
    handlers[LOW] = handlers[MIDDLE] = handlers[HIGH] = interrupt;
    put(APIC_TPR, 0);
    arrived = 0;
    send_self(LOW);
    check("an interrupt waits in the IRR", bit_of(APIC_IRR, LOW), 1);
    check("and not in the ISR", bit_of(APIC_ISR, LOW), 0);
    check("nothing came with IF clear", arrived, 0);
    let_in();
    check("it comes", arrived, 1);
    check("inside, the ISR has it", isr_inside, 1);
    check("inside, the IRR has not", irr_inside, 0);
    check("inside, the PPR is its class", ppr_inside & 0xf0, LOW & 0xf0);
    check("after EOI the ISR is empty", bit_of(APIC_ISR, LOW), 0);
    check("after EOI the PPR is 0", get(APIC_PPR), 0);
    arrived = 0;
    send_self(LOW);
    send_self(HIGH);
    send_self(MIDDLE);
    send_self(MIDDLE);
    let_in();
    check("three came, equal ones merge", arrived, 3);
    check("the highest first", order[0] << 16 | order[1] << 8 | order[2], HIGH << 16 | MIDDLE << 8 | LOW);
    arrived = 0;
    set_cr8(6);
    check("CR8 is the TPR's class", get(APIC_TPR), 0x60);
    check("the PPR follows the TPR", get(APIC_PPR), 0x60);
    send_self(LOW);
    send_self(MIDDLE);
    send_self(HIGH);
    let_in();
    check("the TPR lets only higher classes in", arrived == 1 ? order[0] : arrived, HIGH);
    put(APIC_TPR, 0x50);
    check("the TPR is CR8", get_cr8(), 5);
    let_in();
    check("lowering the TPR lets the next in", arrived == 2 ? order[1] : arrived, MIDDLE);
    interrupts_on();
    set_cr8(0);
    asm volatile("nop; nop; cli" ::: "memory");
    check("lowering CR8 with IF set lets the last in", arrived == 3 ? order[2] : arrived, LOW);
    arrived = 0;
    handlers[MIDDLE] = nesting;
    send_self(MIDDLE);
    let_in();
    handlers[MIDDLE] = interrupt;
    check("nesting: four events", arrived, 4);
    check("middle, high inside it, its end, low", order[0] << 24 | order[1] << 16 | order[2] << 8 | order[3],
          (reg)MIDDLE << 24 | HIGH << 16 | 1 << 8 | LOW);
    put(APIC_ESR, 0);
    put(APIC_ESR, 0);
    handlers[5] = interrupt; /* QEMU delivers it */
    send_self(5);
    let_in();
    put(APIC_ESR, 0);
    check("sending vector 5 is an error", get(APIC_ESR) & 0x20, 0x20);
    put(APIC_ESR, 0);
    put(APIC_ESR, 0);
    check("reading after a second write clears it", get(APIC_ESR), 0);
}

static volatile u32 nmis, nmi_depth, nmi_deepest;
static void nmi(struct frame *f) {
    (void)f;
    if (++nmi_depth > nmi_deepest)
        nmi_deepest = nmi_depth;
    if (++nmis == 1) {
        apic_send(apic_id(), ICR_NMI | ICR_ASSERT);
        for (int i = 0; i < 1000; i++)
            pause();
    }
    nmi_depth--;
}

static void non_maskable(void) {
    handlers[NMI] = nmi;
    apic_send(apic_id(), ICR_NMI | ICR_ASSERT);
    for (int i = 0; i < 1000 && nmis < 2; i++)
        pause();
    check("an NMI comes with IF clear, and a second", nmis, 2);
    check("the second waits for the first one's IRET", nmi_deepest, 1);
    handlers[NMI] = 0;
}

/* ---- the timer */

static int waits_for(u32 count) {
    u64 start = rdtsc();
    interrupts_on();
    while (arrived < count && rdtsc() - start < 4000000000ull)
        pause();
    interrupts_off();
    return arrived >= count;
}

static void timer(void) {
    handlers[TIMER] = interrupt;
    arrived = 0;
    put(APIC_DIVIDE, 0xb);
    put(APIC_LVT_TIMER, LVT_MASKED | TIMER);
    put(APIC_INITIAL, 0x10000000);
    u32 first = get(APIC_CURRENT);
    for (int i = 0; i < 2000; i++)
        pause();
    u32 second = get(APIC_CURRENT);
    check("the count goes down", first <= 0x10000000 && second < first, 1);
    put(APIC_INITIAL, 0);
    check("an initial count of 0 stops it", get(APIC_CURRENT), 0);
    put(APIC_INITIAL, 1000);
    while (get(APIC_CURRENT))
        ;
    let_in();
    check("a masked timer does not interrupt", arrived, 0);
    put(APIC_LVT_TIMER, TIMER);
    let_in();
    check("nor when unmasked afterwards", arrived, 0);
    put(APIC_INITIAL, 1000);
    check("one shot: the interrupt comes", waits_for(1), 1);
    for (int i = 0; i < 2000; i++)
        pause();
    let_in();
    check("once", arrived, 1);
    check("the count stays 0", get(APIC_CURRENT), 0);
    arrived = 0;
    put(APIC_INITIAL, 100000);
    while (!arrived)
        wait_interrupt();
    check("HLT wakes up for it", arrived, 1);
    arrived = 0;
    put(APIC_LVT_TIMER, TIMER_PERIODIC | TIMER);
    put(APIC_INITIAL, 50000);
    check("periodic: five interrupts", waits_for(5), 1);
    check("the initial count reads back", get(APIC_INITIAL), 50000);
    put(APIC_INITIAL, 0);
    let_in();
    u32 stopped = arrived;
    for (int i = 0; i < 2000; i++)
        pause();
    let_in();
    check("a count of 0 ends them", arrived, stopped);
    put(APIC_LVT_TIMER, LVT_MASKED | TIMER);
}

static void deadline(void) {
    if (!cpu_has(1, 0, 2, 24)) {
        skip("TSC deadline", "not in CPUID");
        return;
    }
    handlers[TIMER] = interrupt;
    arrived = 0;
    put(APIC_LVT_TIMER, TIMER);
    wrmsr(TSC_DEADLINE_MSR, rdtsc() + 1000);
    check("no deadline in another mode", rdmsr(TSC_DEADLINE_MSR), 0);
    put(APIC_LVT_TIMER, TIMER_DEADLINE | TIMER);
    asm volatile("mfence" ::: "memory");
    u64 far = rdtsc() + (1ull << 50);
    wrmsr(TSC_DEADLINE_MSR, far);
    check("a deadline reads back", rdmsr(TSC_DEADLINE_MSR), far);
    put(APIC_INITIAL, 1000);
    check("the initial count is ignored", get(APIC_CURRENT), 0);
    wrmsr(TSC_DEADLINE_MSR, 0);
    check("0 disarms it", rdmsr(TSC_DEADLINE_MSR), 0);
    wrmsr(TSC_DEADLINE_MSR, 1);
    check("a deadline that has passed comes at once", waits_for(1), 1);
    check("and reads as 0", rdmsr(TSC_DEADLINE_MSR), 0);
    arrived = 0;
    u64 at = rdtsc() + 200000;
    wrmsr(TSC_DEADLINE_MSR, at);
    while (!arrived)
        wait_interrupt();
    check("HLT waits for a deadline", rdtsc() >= at, 1);
    check("once", arrived, 1);
    wrmsr(TSC_DEADLINE_MSR, far);
    put(APIC_LVT_TIMER, TIMER);
    check("leaving the mode disarms it", rdmsr(TSC_DEADLINE_MSR), 0);
    put(APIC_LVT_TIMER, LVT_MASKED | TIMER);
}

/* ---- x2APIC */

static void x2apic(void) {
    if (!cpu_has(1, 0, 2, 21)) {
        skip("x2APIC", "not in CPUID");
        return;
    }
    TRAPS(x2_early, "x2APIC registers outside the mode", "mov $0x802, %ecx", "rdmsr", GP, 0);
    u32 id = apic_id();
    u64 base = rdmsr(APIC_BASE_MSR);
    wrmsr(APIC_BASE_MSR, base | APIC_BASE_X2);
    x2 = 1;
    say("x2APIC\n");
    check("the mode is on", rdmsr(APIC_BASE_MSR) & APIC_BASE_X2, APIC_BASE_X2);
    check("the id has 32 bits", get(APIC_ID), id);
    check("the logical id follows from it", get(APIC_LDR), (id >> 4 << 16) | 1 << (id & 15));
    TRAPS(x2_to_x, "back to xAPIC without disabling", "mov $0x1b, %ecx; rdmsr; and $~0x400, %eax", "wrmsr", GP, 0);
    TRAPS(x2_dfr, "there is no destination format register", "mov $0x80e, %ecx", "rdmsr", GP, 0);
    TRAPS(x2_icr_high, "there is no second command register", "mov $0x831, %ecx", "rdmsr", GP, 0);
    TRAPS(x2_id_write, "the id cannot be written", "mov $0x802, %ecx; xor %eax, %eax; xor %edx, %edx", "wrmsr", GP, 0);
    TRAPS(x2_eoi_value, "EOI takes only 0", "mov $0x80b, %ecx; mov $1, %eax; xor %edx, %edx", "wrmsr", GP, 0);
    TRAPS(x2_eoi_read, "EOI cannot be read", "mov $0x80b, %ecx", "rdmsr", GP, 0);
    TRAPS(x2_tpr, "reserved bits of the TPR", "mov $0x808, %ecx; mov $0x100, %eax; xor %edx, %edx", "wrmsr", GP, 0);
    TRAPS(x2_high, "reserved high halves", "mov $0x808, %ecx; xor %eax, %eax; mov $1, %edx", "wrmsr", GP, 0);
    registers();
    priorities();
    timer();
    deadline();
    arrived = 0;
    wrmsr(X2APIC_MSR + 0x3f, MIDDLE);
    let_in();
    check("the self-IPI register", arrived == 1 ? order[0] : arrived, MIDDLE);
    arrived = 0;
    wrmsr(X2APIC_MSR + APIC_ICR / 16, (u64)id << 32 | ICR_ASSERT | LOW);
    let_in();
    check("a command with a 32-bit destination", arrived == 1 ? order[0] : arrived, LOW);
    wrmsr(APIC_BASE_MSR, base & ~(u64)APIC_BASE_ON);
    x2 = 0;
    check("off, CPUID has no APIC", cpu_has(1, 0, 3, 9), 0);
    wrmsr(APIC_BASE_MSR, base);
    check("on again, it has", cpu_has(1, 0, 3, 9), 1);
    check("and xAPIC answers", apic_id(), id);
    apic_on();
}

void bare_main(void) {
    u64 base = rdmsr(APIC_BASE_MSR);
    check("the APIC is on, at its address", base & ~0x1ffull, 0xfee00800);
    check("this is the boot processor", base >> 8 & 1, 1);
    check("the id is 0", apic_id(), 0);
    apic_on();
    registers();
    priorities();
    non_maskable();
    timer();
    deadline();
    x2apic();
}
