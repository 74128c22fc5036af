/* 32-bit paging with 4 MiB pages and PAE paging (SDM 3A 4.3 and 4.4). Kernel and user share the low 4 MiB, mapped to
 * themselves; the window is at 1 GiB. */
#include "common/bare.h"

#define P 1ull
#define RW 2ull
#define US 4ull
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define G 0x100ull
#define NX (1ull << 63)
#define ALL (P | RW | US)

enum { CR4_PSE = 1 << 4, CR4_PAE = 1 << 5, CR4_PGE = 1 << 7, CR0_WP = 1 << 16, EFER = 0xc0000080, NXE = 1 << 11 };
enum access { READ, WRITE, FETCH };
enum { NONE = 0x1000, OTHER_VECTOR = 0x2000, OTHER_ADDRESS = 0x4000 };
enum { E_P = 1, E_W = 2, E_U = 4, E_RSVD = 8, E_I = 16 };
#define WINDOW 0x40000000u
#define LARGE 0x40400000u
enum { KERNEL_CODE_AT = 0, USER_CODE_AT = 16, DATA_AT = 64 };
#define PAGE_ALIGNED __attribute__((aligned(4096)))

static volatile u32 pd[1024] PAGE_ALIGNED, pt[1024] PAGE_ALIGNED, low[1024] PAGE_ALIGNED;
static volatile u64 pae_pdpt[4] PAGE_ALIGNED, pae_pd[2][512] PAGE_ALIGNED, pae_pt[512] PAGE_ALIGNED, pae_low[2][512] PAGE_ALIGNED;
static u8 pages[2][PAGE] PAGE_ALIGNED;
static int pae, nxe;

PROBE(kernel_read, "mov 4(%esp), %edx", "movb (%edx), %cl");
PROBE(kernel_write, "mov 4(%esp), %edx", "movb %cl, (%edx)");
USER_PROBE(user_read, "", "movb (%eax), %cl");
USER_PROBE(user_write, "", "movb %cl, (%eax)");

static reg fault_of(enum access kind, int user, reg page) {
    reg address = page + (kind != FETCH ? DATA_AT : user ? USER_CODE_AT : KERNEL_CODE_AT);
    if (kind == FETCH && user)
        run_user((void *)address, 0);
    else if (kind == FETCH)
        run_kernel((void *)address, 0);
    else if (user)
        run_user(kind == WRITE ? user_write : user_read, address);
    else
        run_kernel(kind == WRITE ? kernel_write : kernel_read, address);
    if (last.vector == (user ? USER_END : NO_TRAP))
        return NONE;
    if (last.vector != PF)
        return OTHER_VECTOR | last.vector;
    return last.cr2 == address ? last.error : OTHER_ADDRESS | last.error;
}

static void set_leaf(int n, u64 entry) {
    if (pae)
        pae_pt[n] = entry;
    else
        pt[n] = entry;
    invlpg(WINDOW + n * 4096);
}
static u64 leaf(int n) { return pae ? pae_pt[n] : pt[n]; }
static void set_directory(u64 bits) {
    if (pae)
        pae_pd[1][0] = (reg)pae_pt | bits;
    else
        pd[256] = (reg)pt | bits;
    set_cr3(get_cr3());
}
static u64 directory(void) { return pae ? pae_pd[1][0] : pd[256]; }

/* ---- permissions */

static reg manual_says(u64 upper, u64 lower, enum access kind, int user, int wp) {
    reg code = (kind == WRITE ? E_W : 0) | (user ? E_U : 0) | (kind == FETCH && nxe ? E_I : 0);
    if (!(lower & P))
        return code;
    int users = (upper & lower & US) != 0, writable = (upper & lower & RW) != 0, bad;
    if (kind == FETCH)
        bad = ((upper | lower) & NX) || (user && !users);
    else
        bad = user ? !users || (kind == WRITE && !writable) : kind == WRITE && wp && !writable;
    return bad ? code | E_P : NONE;
}

static u64 entry_bits(int choice) { return (choice & 1 ? RW : 0) | (choice & 2 ? US : 0) | (choice & 4 && nxe ? NX : 0); }

static void permissions(const char *name, int wp) {
    u32 wrong = 0;
    set_cr0((get_cr0() & ~(reg)CR0_WP) | (wp ? CR0_WP : 0));
    for (int choice = 0; choice < 128; choice++) {
        u64 upper = P | entry_bits(choice), lower = (choice & 64 ? P : 0) | entry_bits(choice >> 3);
        set_directory(upper);
        set_leaf(0, (reg)pages[0] | lower);
        int accessed = 0, written = 0;
        for (int user = 0; user < 2; user++)
            for (int kind = READ; kind <= FETCH; kind++) {
                reg want = manual_says(upper, lower, kind, user, wp), got = fault_of(kind, user, WINDOW);
                if (want != got && wrong++ < 3)
                    say("  directory %x table %x access %d user %d want %x got %x\n", (reg)upper, (reg)lower, kind, user, want, got);
                accessed |= want == NONE;
                written |= want == NONE && kind == WRITE;
            }
        wrong += accessed && !(directory() & leaf(0) & A);
        wrong += !!(leaf(0) & D) != written;
    }
    check(name, wrong, 0);
    set_directory(ALL);
    set_cr0(get_cr0() | CR0_WP);
}

static void across_pages(void) {
    PROBE(write4, "mov 4(%esp), %edx; mov $0x11223344, %eax", "movl %eax, (%edx)");
    set_leaf(1, (reg)pages[0] | ALL);
    set_leaf(2, (reg)pages[1] | ALL);
    reg edge = WINDOW + 2 * 4096 - 2;
    run_kernel(write4, edge);
    check("a split write's low half", *(u16 *)(pages[0] + PAGE - 2), 0x3344);
    check("a split write's high half", *(u16 *)pages[1], 0x1122);
    *(u16 *)(pages[0] + PAGE - 2) = 0;
    set_leaf(2, 0);
    run_kernel(write4, edge);
    check_trap("a split write, second page absent", PF, E_W, (reg)write4_at);
    check("its address is the second page", last.cr2, WINDOW + 2 * 4096);
    check("the first page is untouched", *(u16 *)(pages[0] + PAGE - 2), 0);
    set_leaf(1, (reg)pages[1] | ALL);
    pages[0][DATA_AT] = 1, pages[1][DATA_AT] = 2;
    volatile u8 *window = (u8 *)(WINDOW + 4096 + DATA_AT);
    check("INVLPG shows a change", *window, 2);
    if (pae)
        pae_pt[1] = (reg)pages[0] | ALL;
    else
        pt[1] = (reg)pages[0] | ALL;
    set_cr3(get_cr3());
    check("a CR3 load shows a change", *window, 1);
}

/* ---- 32-bit paging */

static void paging_on(reg root, reg cr4) {
    set_cr0(get_cr0() & 0x7fffffff);
    set_cr4((get_cr4() & ~(reg)(CR4_PSE | CR4_PAE)) | cr4);
    set_cr3(root);
    set_cr0(get_cr0() | 0x80000000u);
}

static void classic(void) {
    pae = nxe = 0;
    for (u32 i = 0; i < 1024; i++)
        low[i] = i << 12 | ALL;
    pd[0] = (reg)low | ALL;
    pd[256] = (reg)pt | ALL;
    paging_on((reg)pd, CR4_PSE);
    say("32-bit paging\n");
    permissions("permissions with wp=0", 0);
    permissions("permissions with wp=1", 1);
    across_pages();
    if (!cpu_has(1, 0, 3, 3)) {
        skip("4 MiB pages", "not in CPUID");
        return;
    }
    reg at = (reg)pages[0] + DATA_AT;
    pd[257] = ALL | PS;
    pages[0][DATA_AT] = 0x11;
    check("a 4 MiB page reads", *(volatile u8 *)(LARGE + at), 0x11);
    check("its read sets A and not D", pd[257] & (A | D), A);
    *(volatile u8 *)(LARGE + at) = 0x22;
    check("a 4 MiB page writes", *(volatile u8 *)at, 0x22);
    check("its write sets D", pd[257] & D, D);
    pd[257] = P | US | PS;
    invlpg(LARGE + 0x3ff000);
    check("INVLPG anywhere in a 4 MiB page drops it", fault_of(WRITE, 1, LARGE + (reg)pages[0]), E_P | E_W | E_U);
    pd[257] = ALL | PS | 1 << 21;
    invlpg(LARGE);
    check("bit 21 of a 4 MiB entry is reserved", fault_of(READ, 1, LARGE + (reg)pages[0]), E_P | E_U | E_RSVD);
    /* Without CR4.PSE the entry names a table, whatever bit 7 says. */
    pd[257] = (reg)low | ALL | PS;
    set_cr4(get_cr4() & ~(reg)CR4_PSE);
    check("bit 7 is ignored without CR4.PSE", *(volatile u8 *)(LARGE + at), 0x22);
    set_cr4(get_cr4() | CR4_PSE);
    pd[257] = 0;
}

/* ---- PAE paging */

PROBE(load_cr3, "mov 4(%esp), %edx", "mov %edx, %cr3");

static void pae_paging(void) {
    if (!cpu_has(1, 0, 3, 6)) {
        skip("PAE", "not in CPUID");
        return;
    }
    pae = 1;
    int has_nx = cpu_has(0x80000001, 0, 3, 20);
    for (u32 i = 0; i < 1024; i++)
        pae_low[i / 512][i % 512] = (u64)i << 12 | ALL;
    pae_pdpt[0] = (reg)pae_pd[0] | P;
    pae_pdpt[1] = (reg)pae_pd[1] | P;
    pae_pd[0][0] = (reg)pae_low[0] | ALL;
    pae_pd[0][1] = (reg)pae_low[1] | ALL;
    paging_on((reg)pae_pdpt, CR4_PAE);
    set_directory(ALL);
    say("PAE paging\n");
    permissions("PAE permissions with wp=0 nxe=0", 0);
    permissions("PAE permissions with wp=1 nxe=0", 1);
    set_leaf(0, (reg)pages[0] | ALL | NX);
    check("bit 63 is reserved without EFER.NXE", fault_of(READ, 0, WINDOW), E_P | E_RSVD);
    if (has_nx) {
        wrmsr(EFER, rdmsr(EFER) | NXE);
        nxe = 1;
        permissions("PAE permissions with wp=0 nxe=1", 0);
        permissions("PAE permissions with wp=1 nxe=1", 1);
    } else
        skip("NX", "not in CPUID");
    across_pages();
    reg at = (reg)pages[0] + DATA_AT;
    pae_pd[1][2] = ALL | PS;
    pages[0][DATA_AT] = 0x11;
    check("a 2 MiB page reads, with CR4.PSE clear", *(volatile u8 *)(LARGE + at), 0x11);
    check("its read sets A and not D", pae_pd[1][2] & (A | D), A);
    *(volatile u8 *)(LARGE + at) = 0x22;
    check("a 2 MiB page writes", *(volatile u8 *)at, 0x22);
    check("its write sets D", pae_pd[1][2] & D, D);
    pae_pd[1][2] = ALL | PS | 1 << 13;
    invlpg(LARGE);
    check("bit 13 of a 2 MiB entry is reserved", fault_of(READ, 1, LARGE + (reg)pages[0]), E_P | E_U | E_RSVD);
    set_leaf(0, (reg)pages[0] | ALL | 1ull << 62);
    check("bit 62 of an entry is reserved", fault_of(READ, 1, WINDOW), E_P | E_U | E_RSVD);
    set_leaf(0, (reg)pages[0] | ALL);
    /* The four top entries are registers, loaded with CR3 (4.4.1). */
    pae_pdpt[1] = 0;
    invlpg(WINDOW);
    check("a PDPT entry's change waits for CR3", fault_of(READ, 0, WINDOW), NONE);
    set_cr3(get_cr3());
    check("and comes with it", fault_of(READ, 0, WINDOW), 0);
    pae_pdpt[1] = (reg)pae_pd[1] | P | RW;
    run_kernel(load_cr3, get_cr3());
    check_trap("reserved bits of a PDPT entry are a #GP of MOV CR3", GP, 0, (reg)load_cr3_at);
    pae_pdpt[1] = (reg)pae_pd[1] | RW;
    run_kernel(load_cr3, get_cr3());
    check_trap("but not of an absent one", NO_TRAP, 0, 0);
    pae_pdpt[1] = (reg)pae_pd[1] | P;
    set_cr3(get_cr3());
    check("the window is back", fault_of(READ, 0, WINDOW), NONE);
    set_cr0(get_cr0() & 0x7fffffff);
    check("and without paging the low memory is there", *(volatile u8 *)at, 0x22);
}

void bare_main(void) {
    for (u32 i = 0; i < ARRAY_SIZE(pages); i++) {
        pages[i][KERNEL_CODE_AT] = 0xc3;
        pages[i][USER_CODE_AT] = 0xcd;
        pages[i][USER_CODE_AT + 1] = USER_END;
    }
    classic();
    pae_paging();
}
