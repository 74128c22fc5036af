/* How late a timer's interrupt comes to a processor that computes. */
#include "common/apic.h"

enum { TIMER = 0x60, ROUNDS = 101, FREQUENCY_LEAF = 0x40000010, LIMIT_US = 200 };
static volatile u64 arrived;
static volatile u32 words[1024];

static void on_timer(struct frame *f) {
    (void)f;
    arrived = rdtsc();
    apic_eoi();
}

/* Ways to compute; each comes back when the interrupt has come. */
static void an_empty_loop(void) { asm volatile("1: cmpq $0, %0; je 1b" ::"m"(arrived) : "cc", "memory"); }

static void a_loop_of_jumps(void) {
    asm volatile("1: jmp 2f; 3: cmpq $0, %0; jne 4f; jmp 1b; 2: jmp 3b; 4:" ::"m"(arrived) : "cc", "memory");
}

static void a_loop_of_stores(void) {
    for (u32 i = 0; !arrived; i++)
        words[i % 1024] = words[(i + 7) % 1024] * 3 + i;
}

static u32 __attribute__((noinline)) fibonacci(u32 n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
static void recursion(void) {
    while (!arrived)
        words[0] = fibonacci(9);
}

static void calls_by_pointers(void) {
    static u32 (*volatile to)(u32) = fibonacci;
    while (!arrived)
        words[0] += to(1);
}

static void a_loop_of_loop(void) {
    while (!arrived)
        asm volatile("mov $100, %%ecx; 1: loop 1b" ::: "ecx", "cc");
}

static void string_instructions(void) {
    while (!arrived) {
        void *to = (void *)words;
        reg count = sizeof(words);
        asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(0) : "memory");
    }
}

static void system_instructions(void) {
    u32 r[4];
    while (!arrived)
        cpuid(0, 0, r);
}

static void interrupts_off_and_on(void) {
    while (!arrived)
        asm volatile("cli; nop; sti; nop" ::: "memory");
}

static u64 lateness[ROUNDS];

static u64 median(void) {
    for (u32 i = 1; i < ROUNDS; i++)
        for (u32 j = i; j && lateness[j] < lateness[j - 1]; j--) {
            u64 other = lateness[j];
            lateness[j] = lateness[j - 1];
            lateness[j - 1] = other;
        }
    return lateness[ROUNDS / 2];
}

static void measure(const char *name, void (*compute)(void), u64 khz) {
    for (u32 i = 0; i < ROUNDS; i++) {
        u64 due = rdtsc() + khz / 2;
        arrived = 0;
        wrmsr(TSC_DEADLINE_MSR, due);
        interrupts_on();
        compute();
        interrupts_off();
        lateness[i] = arrived - due;
    }
    u32 us = median() * 1000 / khz;
    say("%s: %d us late\n", name, us);
    check(name, us < LIMIT_US, 1);
}

void bare_main(void) {
    u32 r[4];
    apic_on();
    handlers[TIMER] = on_timer;
    apic_write(APIC_LVT_TIMER, TIMER);
    apic_write(APIC_INITIAL, 10000);
    interrupts_on();
    an_empty_loop();
    interrupts_off();
    check("a timer ends an empty loop", arrived != 0, 1);
    cpuid(0x40000000, 0, r);
    u32 last_leaf = r[0];
    cpuid(FREQUENCY_LEAF, 0, r);
    if (under_tcg() || last_leaf < FREQUENCY_LEAF || last_leaf > FREQUENCY_LEAF + 0xff || !cpu_has(1, 0, 2, 24)) {
        skip("how late it is", "the frequency is not told, or QEMU's TCG is below");
        return;
    }
    apic_write(APIC_LVT_TIMER, TIMER_DEADLINE | TIMER);
    asm volatile("mfence" ::: "memory");
    measure("a timer in an empty loop", an_empty_loop, r[0]);
    measure("a timer in a loop of jumps", a_loop_of_jumps, r[0]);
    measure("a timer in a loop of stores", a_loop_of_stores, r[0]);
    measure("a timer in recursion", recursion, r[0]);
    measure("a timer in calls by pointers", calls_by_pointers, r[0]);
    measure("a timer in a loop of LOOP", a_loop_of_loop, r[0]);
    measure("a timer in string instructions", string_instructions, r[0]);
    measure("a timer in system instructions", system_instructions, r[0]);
    measure("a timer in CLI and STI", interrupts_off_and_on, r[0]);
}
