/* Code that changes while processors run it: by the protocol with INT3 that kernels use, by another page at its address, by a
 * device that reads a disk over it (SDM 3A 8.1.3, 4.10.5). */
#include "common/disk.h"
#include "common/smp.h"

#define PAGE_ALIGNED __attribute__((aligned(4096)))
extern u64 boot_pml4[512];
static volatile u64 pdpt[512] PAGE_ALIGNED, pd[512] PAGE_ALIGNED, pt[512] PAGE_ALIGNED;
typedef u32 (*code)(void);

enum { SYNC = 0x90, SHOOT = 0xa0, MARKER = 0xccccccccu };
static u32 boss, generations;
static volatile u32 acknowledged, published, over, wrong, stale;
static volatile u32 ran[MAX_CPUS] __attribute__((aligned(64)));

static int on_boss(void) { return apic_id() == boss; }

/* Every other processor does what the vector's handler does, and says so. */
static void everywhere(u32 vector) {
    acknowledged = 0;
    if (cpus > 1)
        apic_write(APIC_ICR, ICR_OTHERS | ICR_ASSERT | vector);
    if (!wait_until(acknowledged == cpus - 1))
        die("a processor did not answer");
}

/* All others have run at least twice since, so that generations, which count modulo 256, can be told apart. */
static void let_run(void) {
    for (u32 i = 0; i < MAX_CPUS; i++) {
        u32 seen = ran[i];
        if (online >> i & 1 && i != boss && !wait_until(ran[i] - seen >= 2))
            die("a processor does not get on");
    }
}

static u32 bytes_of(u32 generation) { return (generation & 0xff) * 0x01010101u; }

/* What a processor saw that knew that `least` was everywhere. */
static void judge(u32 value, u32 least) {
    if (value != bytes_of(value))
        atomic_add(&wrong, 1);
    else if ((u8)(value - least) >= 128)
        atomic_add(&stale, 1);
}

static void begin(void) {
    acknowledged = published = over = wrong = stale = 0;
    for (u32 i = 0; i < MAX_CPUS; i++)
        ran[i] = 0;
}

/* ---- the protocol with INT3 */

/* Five bytes that change, wherever they may lie: in a line, over the end of one, over the end of a page. */
enum { SITES = 3 };
static u8 text[2 * PAGE] PAGE_ALIGNED;
static const u32 sites[SITES] = {64, 190, PAGE - 2};
static volatile u32 traps;

static void on_sync(struct frame *f) {
    (void)f;
    u32 r[4];
    cpuid(0, 0, r); /* serializes */
    atomic_add(&acknowledged, 1);
    apic_eoi();
}

static void on_breakpoint(struct frame *f) {
    /* Does what the instruction may do: a load of EAX, and it is over. */
    f->rax = MARKER;
    f->ip += 4;
    atomic_add(&traps, 1);
}

/* All writes go through a second mapping, as a kernel's do. */
static void poke(u32 at, const u8 *bytes, u32 length) {
    volatile u8 *to = (u8 *)USER(text + at);
    for (u32 i = 0; i < length; i++)
        to[i] = bytes[i];
}

static void replace(u32 at, const u8 bytes[5]) {
    static const u8 int3 = 0xcc;
    u32 r[4];
    poke(at, &int3, 1);
    cpuid(0, 0, r);
    everywhere(SYNC);
    poke(at + 1, bytes + 1, 4);
    cpuid(0, 0, r);
    everywhere(SYNC);
    poke(at, bytes, 1);
    cpuid(0, 0, r);
    everywhere(SYNC);
}

static void run_sites(u32 cpu) {
    interrupts_on();
    while (!over) {
        for (u32 i = 0; i < SITES; i++) {
            u32 least = published, value = ((code)(text + sites[i]))();
            if (value != MARKER)
                judge(value, least);
        }
        ran[cpu]++;
    }
    interrupts_off();
}

static void patch_sites(u32 cpu) {
    if (!on_boss()) {
        run_sites(cpu);
        return;
    }
    for (u32 g = 1; g <= generations; g++) {
        for (u32 i = 0; i < SITES; i++) {
            u8 load[5] = {0xb8, g, g, g, g}; /* mov $..., %eax */
            replace(sites[i], load);
        }
        published = g;
        if (g % 16 == 0)
            let_run();
    }
    over = 1;
}

/* mov or jump over it: the block's end changes, not only a number in it. */
static void patch_branches(u32 cpu) {
    static const u8 nop[5] = {0x0f, 0x1f, 0x44, 0, 0}, jump[5] = {0xe9, 6, 0, 0, 0};
    if (!on_boss()) {
        interrupts_on();
        while (!over) {
            u32 least = published, value = ((code)(text + sites[1]))();
            /* An even generation jumps; what runs meanwhile may be either. */
            if (value != 1 && value != 2)
                atomic_add(&wrong, 1);
            else if (least == published && !(least & 1) && value != 1 + (least >> 1 & 1))
                atomic_add(&stale, 1);
            ran[cpu]++;
        }
        interrupts_off();
        return;
    }
    /* Odd while a change is under way. */
    for (u32 g = 1; g <= generations; g++) {
        published = 2 * g - 1;
        replace(sites[1], g & 1 ? jump : nop);
        published = 2 * g;
        if (g % 4 == 0)
            let_run();
    }
    over = 1;
}

static void on_breakpoint_at_branch(struct frame *f) {
    f->ip += 4;
    atomic_add(&traps, 1);
}

static void by_protocol(void) {
    static const u8 first[6] = {0xb8, 0, 0, 0, 0, 0xc3};
    handlers[SYNC] = on_sync;
    handlers[BP] = on_breakpoint;
    for (u32 i = 0; i < SITES; i++)
        memcpy(text + sites[i], first, 6);
    begin();
    on_all(patch_sites);
    check("an instruction replaced by way of INT3 is the old or the new one", wrong, 0);
    check("and the new one once all have synchronized", stale, 0);
    say("INT3 was met %d times\n", traps);

    /* nop or jmp; mov $1, %eax; ret; mov $2, %eax; ret */
    static const u8 branch[17] = {0x0f, 0x1f, 0x44, 0, 0, 0xb8, 1, 0, 0, 0, 0xc3, 0xb8, 2, 0, 0, 0, 0xc3};
    memcpy(text + sites[1], branch, sizeof(branch));
    handlers[BP] = on_breakpoint_at_branch;
    begin();
    on_all(patch_branches);
    check("a branch switched on and off leads one way or the other", wrong, 0);
    check("and the new way once all have synchronized", stale, 0);
    handlers[BP] = 0;
}

/* ---- another page at the address of running code */

enum { WINDOW_DATA = 256, WINDOW_COUNTS = 512, POISON = 0xdead, PAGES = 3 };
#define WINDOW (1ul << 39)
static u8 moving[PAGES][PAGE] PAGE_ALIGNED;
static volatile u32 poisoned, late_stores;

static void on_shoot(struct frame *f) {
    (void)f;
    invlpg(WINDOW);
    atomic_add(&acknowledged, 1);
    apic_eoi();
}

static void fill(u8 *page, u32 value) {
    *(volatile u32 *)(page + 1) = value;
    *(volatile u8 *)page = 0xb8;
    *(volatile u8 *)(page + 5) = 0xc3;
    *(volatile u32 *)(page + WINDOW_DATA) = value;
}

static u32 stores(const u8 *page) {
    u32 sum = 0;
    for (u32 i = 0; i < MAX_CPUS; i++)
        sum += *(volatile u32 *)(page + WINDOW_COUNTS + 4 * i);
    return sum;
}

static void move_pages(u32 cpu) {
    volatile u32 *data = (u32 *)(WINDOW + WINDOW_DATA), *count = (u32 *)(WINDOW + WINDOW_COUNTS + 4 * cpu);
    if (!on_boss()) {
        interrupts_on();
        while (!over) {
            u32 least = published, value = ((code)WINDOW)(), read = *data;
            ++*count;
            if (value == POISON || read == POISON)
                atomic_add(&poisoned, 1);
            else
                judge(value, least), judge(read, least);
            ran[cpu]++;
        }
        interrupts_off();
        return;
    }
    u32 was[PAGES] = {0};
    for (u32 g = 1; g <= 4 * generations; g++) {
        u8 *old = moving[(g - 1) % PAGES], *new = moving[g % PAGES];
        /* Nobody has stored to it since it was taken away. */
        late_stores += stores(new) != was[g % PAGES];
        fill(new, bytes_of(g));
        pt[0] = (reg)new | 3;
        invlpg(WINDOW);
        everywhere(SHOOT);
        published = g;
        was[(g - 1) % PAGES] = stores(old);
        fill(old, POISON);
        if (g % 16 == 0)
            let_run();
    }
    over = 1;
}

static void by_mapping(void) {
    handlers[SHOOT] = on_shoot;
    boot_pml4[1] = (reg)pdpt | 3;
    pdpt[0] = (reg)pd | 3;
    pd[0] = (reg)pt | 3;
    pt[0] = (reg)moving[0] | 3;
    fill(moving[0], 0);
    begin();
    on_all(move_pages);
    check("a page of code that comes in place of another is whole", wrong, 0);
    check("nobody runs or reads the page after its shootdown", stale, 0);
    check("nor what is put into it then", poisoned, 0);
    check("nor writes to it", late_stores, 0);
}

/* ---- a device */

enum { READS = 300, SECTORS = 64 };
static u8 spun[PAGE] PAGE_ALIGNED;
static volatile u32 returned;

/* The disk's sector n has two NOPs, mov $n, %eax and ret there: wherever a processor is in the loop, it goes on with them. */
static void spin(u32 cpu) {
    (void)cpu;
    if (on_boss())
        disk_read(published, (reg)spun);
    u32 value = ((code)spun)();
    if (value != published)
        atomic_add(&wrong, 1);
    atomic_add(&returned, 1);
}

static void by_device(void) {
    /* 0: nop; nop; jmp 0b: nothing that a translator would leave its code for. */
    static const u8 loop[4] = {0x90, 0x90, 0xeb, 0xfc};
    if (!disk_start()) {
        skip("code that a disk is read over", "there is no disk");
        return;
    }
    begin();
    say("%d reads over a loop with interrupts off; silence from here is a loop that did not notice\n", READS);
    for (u32 i = 0; i < READS; i++) {
        published = i % SECTORS;
        memcpy(spun, loop, 4);
        on_all(spin);
        if (!wait_until(disk_done()))
            die("the disk does not answer");
    }
    check("every processor left the loop", returned, READS * cpus);
    check("by the code that was read", wrong, 0);
}

void bare_main(void) {
    smp_start();
    boss = apic_id();
    say("%d processors\n", cpus);
    /* More than two wait for each other, unless the host has as many. */
    generations = (cpus == 2 ? 200 : 40) * (told("long") ? 20 : 1);
    if (cpus == 1)
        skip("code that another processor changes", "there is one");
    else {
        by_protocol();
        by_mapping();
    }
    by_device();
}
