/* Several processors (SDM 3A, chapters 8 and 11): starting them, IPIs of all kinds, wake-ups, atomicity, memory order, TLB
 * shootdowns. */
#include "common/smp.h"

enum { IPI = 0x60, TIMER = 0x70, SHOOT = 0x80 + 1 };
static volatile u32 received[MAX_CPUS], timers[MAX_CPUS], nmis[MAX_CPUS];
static u32 everybody(void) { return online; }

static void on_ipi(struct frame *f) {
    (void)f;
    atomic_add(&received[apic_id()], 1);
    apic_eoi();
}
static void on_timer(struct frame *f) {
    (void)f;
    timers[apic_id()]++;
    apic_eoi();
}
static void on_nmi(struct frame *f) {
    (void)f;
    atomic_add(&nmis[apic_id()], 1);
}

static u32 total(volatile u32 *counts) {
    u32 sum = 0;
    for (int i = 0; i < MAX_CPUS; i++)
        sum += counts[i];
    return sum;
}
static void forget(volatile u32 *counts) {
    for (int i = 0; i < MAX_CPUS; i++)
        counts[i] = 0;
}

/* Which processors took an interrupt once, after `want` did; all ones when one took more. */
static u32 takers(u32 want) {
    interrupts_on();
    wait_until(total(received) >= want);
    /* Time for one too many. */
    for (int i = 0; i < 2000; i++)
        pause();
    interrupts_off();
    u32 who = 0;
    for (u32 i = 0; i < MAX_CPUS; i++) {
        if (received[i] > 1)
            who = ~0u;
        else
            who |= received[i] << i;
    }
    forget(received);
    return who;
}

static void set_logical_id(u32 cpu) {
    apic_write(APIC_DFR, 0xffffffff);
    apic_write(APIC_LDR, 1u << cpu << 24);
}

static void ipis(void) {
    u32 self = apic_id(), others = everybody() & ~(1u << self), last_one = cpus - 1;
    handlers[IPI] = on_ipi;
    handlers[NMI] = on_nmi;
    on_all(set_logical_id);
    for (u32 to = 0; to < MAX_CPUS; to++) {
        if (!(everybody() >> to & 1))
            continue;
        apic_send(to, ICR_ASSERT | IPI);
        check("a fixed IPI reaches its processor", takers(1), 1u << to);
    }
    apic_write(APIC_ICR, ICR_ALL | ICR_ASSERT | IPI);
    check("all including self", takers(cpus), everybody());
    apic_write(APIC_ICR, ICR_OTHERS | ICR_ASSERT | IPI);
    check("all others", takers(cpus - 1), others);
    apic_write(APIC_ICR, ICR_SELF | ICR_ASSERT | IPI);
    check("self", takers(1), 1u << self);
    apic_send(0xff, ICR_ASSERT | IPI);
    check("the physical broadcast", takers(cpus), everybody());
    apic_send(1u << last_one, ICR_LOGICAL | ICR_ASSERT | IPI);
    check("a logical destination", takers(1), 1u << last_one);
    apic_send(everybody(), ICR_LOGICAL | ICR_ASSERT | IPI);
    check("a logical set", takers(cpus), everybody());
    apic_send(everybody(), ICR_LOGICAL | ICR_LOWEST | ICR_ASSERT | IPI);
    u32 who = takers(1);
    check("lowest priority picks exactly one", who && !(who & (who - 1)) && !(who & ~everybody()), 1);
    apic_send(0x7f, ICR_ASSERT | IPI);
    check("a processor that is not there takes nothing", takers(0), 0);
    apic_write(APIC_ICR, ICR_OTHERS | ICR_NMI | ICR_ASSERT);
    check("an NMI to all others", wait_until(total(nmis) == cpus - 1), 1);
    check("but not to self", nmis[self], 0);
    check("the command register is idle", apic_read(APIC_ICR) >> 12 & 1, 0);
}

static void restart_one(void) {
    u32 id = 31 - __builtin_clz(everybody());
    __atomic_fetch_and(&online, ~(1u << id), __ATOMIC_SEQ_CST);
    /* The flood's last IPIs may come long after their letters. */
    takers(0);
    check("a processor comes up again after INIT and SIPI", start_processor(id), 1);
    forget(received);
    apic_send(id, ICR_ASSERT | IPI);
    check("and takes interrupts", takers(1), 1u << id);
}

/* ---- wake-ups: 100,000 timers and IPIs, each waited for in HLT */

static volatile u32 letters[MAX_CPUS];
static u32 rounds;

static void flood(u32 cpu) {
    u32 next = cpu, seed = cpu * 7919 + 1;
    do
        next = (next + 1) % MAX_CPUS;
    while (!(everybody() >> next & 1));
    timers[cpu] = 0;
    apic_write(APIC_DIVIDE, 0xb);
    apic_write(APIC_LVT_TIMER, TIMER);
    for (u32 i = 1; i <= rounds; i++) {
        seed = seed * 1103515245 + 12345;
        apic_write(APIC_INITIAL, 1 + (seed >> 16) % 3000);
        atomic_add(&letters[next], 1);
        apic_send(next, ICR_ASSERT | IPI);
        /* The interrupt may come at any time up to the HLT, and must end it. */
        while (timers[cpu] < i || letters[cpu] < i)
            wait_interrupt();
    }
    apic_write(APIC_LVT_TIMER, LVT_MASKED | TIMER);
    interrupts_on();
    pause();
    interrupts_off();
}

static void wake_ups(void) {
    handlers[TIMER] = on_timer;
    rounds = 50000 / cpus;
    forget(letters);
    say("%d timers and as many IPIs on each of %d processors; silence from here is a lost wake-up\n", rounds, cpus);
    on_all(flood);
    check("no wake-up was lost", total(timers), rounds * cpus);
    check("every letter arrived", total(letters), rounds * cpus);
    check("no interrupt between STI and HLT", early_interrupts, 0);
}

/* ---- atomicity */

enum { TURNS = 4000 };
static struct {
    volatile u32 increments __attribute__((aligned(64)));
    volatile u64 exchanges, compares;
    volatile u8 bytes[MAX_CPUS] __attribute__((aligned(8)));
    volatile u64 pair[2] __attribute__((aligned(16)));
    u8 pad[60] __attribute__((aligned(64)));
    u8 split[8];
    volatile u32 lock, guarded, bits;
} __attribute__((aligned(64))) shared;

static void compete(u32 cpu) {
    volatile u64 *split = (u64 *)shared.split;
    for (int i = 0; i < TURNS; i++) {
        asm volatile("lock incl %0" : "+m"(shared.increments)::"cc");
        atomic_add(&shared.exchanges, 3);
        u64 old = shared.compares;
        while (!__atomic_compare_exchange_n(&shared.compares, &old, old + 5, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            ;
        /* Neighbours' bytes share a word; a plain store must leave them. */
        shared.bytes[cpu]++;
        u8 done;
        do {
            u64 low = shared.pair[0], high = shared.pair[1];
            asm volatile("lock cmpxchg16b %1; setz %0"
                         : "=q"(done), "+m"(shared.pair), "+a"(low), "+d"(high)
                         : "b"(low + 1), "c"(high + 2)
                         : "cc", "memory");
        } while (!done);
        while (__atomic_exchange_n(&shared.lock, 1, __ATOMIC_SEQ_CST))
            while (shared.lock)
                pause();
        shared.guarded++;
        compiler_barrier();
        shared.lock = 0;
        asm volatile("lock btcl %1, %0" : "+m"(shared.bits) : "r"(cpu) : "cc");
        if (i % 16 == 0)
            asm volatile("lock addq $1, %0" : "+m"(*split)::"cc");
    }
}

static void atomicity(void) {
    if (!cpu_has(1, 0, 2, 13))
        die("no CMPXCHG16B, which every 64-bit processor of today has");
    memset(&shared, 0, sizeof(shared));
    on_all(compete);
    check("LOCK INC", shared.increments, cpus * TURNS);
    check("LOCK XADD", shared.exchanges, cpus * TURNS * 3);
    check("LOCK CMPXCHG", shared.compares, cpus * TURNS * 5);
    check("LOCK CMPXCHG16B, low", shared.pair[0], cpus * TURNS);
    check("LOCK CMPXCHG16B, high", shared.pair[1], cpus * TURNS * 2);
    check("a lock by XCHG", shared.guarded, cpus * TURNS);
    check("LOCK BTC an even number of times", shared.bits, 0);
    u32 bytes = 0;
    for (u32 i = 0; i < MAX_CPUS; i++)
        bytes += shared.bytes[i] == (everybody() >> i & 1 ? TURNS & 0xff : 0);
    check("plain stores leave neighbouring bytes", bytes, MAX_CPUS);
    check("the split word is split", ((reg)shared.split & 63) > 56, 1);
    check("LOCK ADD across cache lines", *(volatile u64 *)shared.split, (u64)cpus * (TURNS / 16));
}

/* ---- memory order (SDM 3A 8.2) */

enum { TRIALS = 3000, STREAM = 30000 };
static volatile u32 x __attribute__((aligned(64))), y __attribute__((aligned(64)));
static volatile u32 at_gate __attribute__((aligned(64)));
static volatile u32 saw[2];
static u32 first_cpu, second_cpu;

/* Two processors leave together. */
static void gate(u32 number) {
    atomic_add(&at_gate, 1);
    while (at_gate < 2 * number)
        pause();
}

static u32 both_zero, both_zero_fenced, both_zero_locked, both_one, behind;

static u32 store_buffering(u32 cpu, int kind, u32 *number) {
    u32 count = 0;
    volatile u32 *mine = cpu == first_cpu ? &x : &y, *other = cpu == first_cpu ? &y : &x;
    for (int i = 0; i < TRIALS; i++) {
        *mine = 0;
        gate(++*number);
        u32 value;
        if (kind == 0)
            asm volatile("movl $1, %1; movl %2, %0" : "=r"(value), "=m"(*mine) : "m"(*other) : "memory");
        else if (kind == 1)
            asm volatile("movl $1, %1; mfence; movl %2, %0" : "=r"(value), "=m"(*mine) : "m"(*other) : "memory");
        else {
            u32 one = 1;
            asm volatile("xchgl %3, %1; movl %2, %0" : "=r"(value), "+m"(*mine) : "m"(*other), "r"(one) : "memory");
        }
        saw[cpu != first_cpu] = value;
        gate(++*number);
        count += !saw[0] && !saw[1];
        gate(++*number);
    }
    return count;
}

static void litmus(u32 cpu) {
    if (cpu != first_cpu && cpu != second_cpu)
        return;
    u32 number = 0;
    u32 plain = store_buffering(cpu, 0, &number), fenced = store_buffering(cpu, 1, &number),
        locked = store_buffering(cpu, 2, &number), loads = 0;
    /* Load buffering: both loads see the other's later store. */
    volatile u32 *mine = cpu == first_cpu ? &x : &y, *other = cpu == first_cpu ? &y : &x;
    for (int i = 0; i < TRIALS; i++) {
        *mine = 0;
        gate(++number);
        u32 value;
        asm volatile("movl %2, %0; movl $1, %1" : "=r"(value), "=m"(*mine) : "m"(*other) : "memory");
        saw[cpu != first_cpu] = value;
        gate(++number);
        loads += saw[0] && saw[1];
        gate(++number);
    }
    /* Message passing: whoever sees the flag sees the data. */
    u32 late = 0;
    x = y = 0;
    gate(++number);
    if (cpu == first_cpu)
        for (u32 i = 1; i <= STREAM; i++)
            asm volatile("movl %2, %0; movl %2, %1" : "=m"(x), "=m"(y) : "r"(i) : "memory");
    else
        for (u32 flag = 0, data; flag < STREAM;) {
            asm volatile("movl %2, %0; movl %3, %1" : "=&r"(flag), "=r"(data) : "m"(y), "m"(x) : "memory");
            late += data < flag;
        }
    gate(++number);
    if (cpu == first_cpu)
        both_zero = plain, both_zero_fenced = fenced, both_zero_locked = locked, both_one = loads;
    else
        behind = late;
}

static void memory_order(void) {
    first_cpu = apic_id();
    second_cpu = __builtin_ctz(everybody() & ~(1u << first_cpu));
    on_all(litmus);
    say("store buffering was seen %d times in %d (allowed)\n", both_zero, TRIALS);
    check("store buffering never across MFENCE", both_zero_fenced, 0);
    check("store buffering never across XCHG", both_zero_locked, 0);
    check("load buffering never", both_one, 0);
    check("message passing never out of order", behind, 0);
}

/* ---- TLB shootdowns */

#define PAGE_ALIGNED __attribute__((aligned(4096)))
extern u64 boot_pml4[512];
static volatile u64 pdpt[512] PAGE_ALIGNED, pd[512] PAGE_ALIGNED, pt[512] PAGE_ALIGNED;
static u32 stamped[2][1024] PAGE_ALIGNED;
#define WINDOW ((volatile u32 *)(1ul << 39))
enum { GENERATIONS = 500 };
static volatile u32 flushed, acknowledged, stale, over;
static u32 boss;

static void on_shoot(struct frame *f) {
    (void)f;
    invlpg((reg)WINDOW);
    atomic_add(&acknowledged, 1);
    apic_eoi();
}

static void shoot(u32 cpu) {
    if (cpu != boss) {
        interrupts_on();
        while (!over) {
            /* After a shootdown of generation g nobody sees an older page. */
            u32 least = flushed, value = *WINDOW;
            if ((int)(value - least) < 0)
                atomic_add(&stale, 1);
        }
        interrupts_off();
        return;
    }
    for (u32 g = 1; g <= GENERATIONS; g++) {
        stamped[g & 1][0] = g;
        pt[0] = (reg)stamped[g & 1] | 3;
        acknowledged = 0;
        invlpg((reg)WINDOW);
        apic_write(APIC_ICR, ICR_OTHERS | ICR_ASSERT | SHOOT);
        if (!wait_until(acknowledged == cpus - 1))
            die("a shootdown was not acknowledged");
        flushed = g;
    }
    over = 1;
}

static void shootdowns(void) {
    boss = apic_id();
    handlers[SHOOT] = on_shoot;
    boot_pml4[1] = (reg)pdpt | 3;
    pdpt[0] = (reg)pd | 3;
    pd[0] = (reg)pt | 3;
    pt[0] = (reg)stamped[0] | 3;
    on_all(shoot);
    check("nobody sees a page after its shootdown", stale, 0);
    check("the last one is there", *WINDOW, GENERATIONS);
}

void bare_main(void) {
    smp_start();
    say("%d processors\n", cpus);
    u32 count = 0;
    for (u32 i = 0; i < MAX_CPUS; i++)
        count += everybody() >> i & 1;
    check("all of them are online", count, cpus);
    ipis();
    wake_ups();
    if (cpus == 1) {
        skip("atomicity, memory order and shootdowns", "there is one processor");
        return;
    }
    restart_one();
    atomicity();
    memory_order();
    shootdowns();
}
