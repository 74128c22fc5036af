/* 4-level paging (SDM 3A, chapter 4): permissions, error codes, accessed and dirty bits, large and global pages, PCIDs,
 * reserved bits, addresses that are not canonical, accesses across pages. */
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

enum { CR4_PGE = 1 << 7, CR4_PCIDE = 1 << 17, CR4_SMEP = 1 << 20, CR4_SMAP = 1 << 21, CR0_WP = 1 << 16, AC_FLAG = 1 << 18 };
enum { EFER = 0xc0000080, NXE = 1 << 11 };
enum access { READ, WRITE, FETCH };
/* What `fault_of` says when nothing faulted, or not as a page fault of this address. */
enum { NONE = 0x1000, OTHER_VECTOR = 0x2000, OTHER_ADDRESS = 0x4000 };
/* Bits of a page fault's error code. */
enum { E_P = 1, E_W = 2, E_U = 4, E_RSVD = 8, E_I = 16 };

/* The window is the second PML4 entry. In each test page: a RET, an INT 0x80 and data. */
#define WINDOW (1ul << 39)
#define VA(n) (WINDOW + (n) * 4096ul)
#define LARGE (WINDOW + (1ul << 21))
#define HUGE (WINDOW + (1ul << 30))
enum { KERNEL_CODE_AT = 0, USER_CODE_AT = 16, DATA_AT = 64 };
#define PAGE_ALIGNED __attribute__((aligned(4096)))
extern u64 boot_pml4[512];
static volatile u64 pdpt[512] PAGE_ALIGNED, pd[512] PAGE_ALIGNED, pt[512] PAGE_ALIGNED;
static u8 pages[4][PAGE] PAGE_ALIGNED;
reg probe_flags = 2;

#define LOAD_FLAGS "pushq probe_flags(%rip); popfq"
PROBE(kernel_read, LOAD_FLAGS, "movb (%rdi), %al");
PROBE(kernel_write, LOAD_FLAGS, "movb %al, (%rdi)");
USER_PROBE(user_read, "", "movb (%rdi), %al");
USER_PROBE(user_write, "", "movb %al, (%rdi)");

static reg user_top(void) { return USER(user_stack + sizeof(user_stack) - 64); }

/* The error code of one access to a test page, or NONE. */
static reg fault_of(enum access kind, int user, reg page) {
    reg address = page + (kind != FETCH ? DATA_AT : user ? USER_CODE_AT : KERNEL_CODE_AT);
    if (kind == FETCH && user) {
        last.vector = NO_TRAP;
        guarded_user(address, 0, USER_CODE, user_top());
    } else if (kind == FETCH)
        run_kernel((void *)address, 0);
    else if (user)
        run_user(kind == WRITE ? user_write : user_read, address);
    else
        run_kernel(kind == WRITE ? kernel_write : kernel_read, address);
    set_flags(2);
    if (last.vector == (user ? USER_END : NO_TRAP))
        return NONE;
    if (last.vector != PF)
        return OTHER_VECTOR | last.vector;
    return last.cr2 == address ? last.error : OTHER_ADDRESS | last.error;
}

static void map(int n, u64 entry) {
    pt[n] = entry;
    invlpg(VA(n));
}

static reg phys(int page) { return (reg)pages[page]; }

static void set_control(u32 cr4, u32 mask) { set_cr4((get_cr4() & ~(reg)mask) | cr4); }

static u32 wp, smep, smap, ac, nxe;

/* What SDM 3A 4.6 and 4.7 say about an access through a directory and a table entry. */
static reg manual_says(u64 upper, u64 leaf, enum access kind, int user) {
    reg code = (kind == WRITE ? E_W : 0) | (user ? E_U : 0) | (kind == FETCH && (nxe || smep) ? E_I : 0);
    if (upper & NX && !nxe)
        return code | E_P | E_RSVD;
    if (!(leaf & P))
        return code;
    if (leaf & NX && !nxe)
        return code | E_P | E_RSVD;
    int users = (upper & leaf & US) != 0, writable = (upper & leaf & RW) != 0, bad;
    if (kind == FETCH)
        bad = ((upper | leaf) & NX) || (user ? !users : smep && users);
    else if (user)
        bad = !users || (kind == WRITE && !writable);
    else
        bad = (smap && !ac && users) || (kind == WRITE && wp && !writable);
    return bad ? code | E_P : NONE;
}

static u64 entry_bits(int choice) { return (choice & 1 ? RW : 0) | (choice & 2 ? US : 0) | (choice & 4 ? NX : 0); }

static u32 wrong;
static void complain(const char *what, u64 upper, u64 leaf, int kind, int user, reg want, reg got) {
    if (wrong++ < 3)
        say("  %s: directory %x table %x access %d user %d want %x got %x\n", what, upper, leaf, kind, user, want, got);
}

/* All directory and table entries, all accesses, under the present control bits. */
static void all_permissions(void) {
    wrong = 0;
    probe_flags = user_flags = 2 | (ac ? AC_FLAG : 0);
    for (int choice = 0; choice < 128; choice++) {
        u64 upper = P | entry_bits(choice), leaf = (choice & 64 ? P : 0) | entry_bits(choice >> 3);
        pd[0] = (reg)pt | upper;
        pt[0] = phys(0) | leaf;
        invlpg(VA(0));
        int accessed = 0, written = 0;
        for (int user = 0; user < 2; user++)
            for (int kind = READ; kind <= FETCH; kind++) {
                reg want = manual_says(upper, leaf, kind, user), got = fault_of(kind, user, VA(0));
                if (want != got)
                    complain("error code", upper, leaf, kind, user, want, got);
                accessed |= want == NONE;
                written |= want == NONE && kind == WRITE;
            }
        if (accessed && !(pd[0] & pt[0] & A))
            complain("accessed bits", upper, leaf, 0, 0, A, pd[0] & pt[0] & A);
        if (!!(pt[0] & D) != written)
            complain("dirty bit", upper, leaf, WRITE, 0, written, pt[0] & D);
    }
    pd[0] = (reg)pt | ALL;
    invlpg(VA(0));
    probe_flags = user_flags = 2;
}

static void permissions(void) {
    int has_smep = cpu_has(7, 0, 1, 7), has_smap = cpu_has(7, 0, 1, 20), has_nx = cpu_has(0x80000001, 0, 3, 20);
    for (int i = 0; i < 32; i++) {
        char name[] = "permissions with wp=0 smep=0 smap=0 ac=0 nxe=0";
        static const u8 digits[] = {20, 27, 34, 39, 45};
        wp = i & 1, smep = i >> 1 & 1, smap = i >> 2 & 1, ac = i >> 3 & 1, nxe = i >> 4 & 1;
        for (int bit = 0; bit < 5; bit++)
            name[digits[bit]] = '0' + (i >> bit & 1);
        if ((smep && !has_smep) || (smap && !has_smap) || (ac && !has_smap) || (nxe && !has_nx)) {
            skip(name, "not in CPUID");
            continue;
        }
        set_cr0((get_cr0() & ~(reg)CR0_WP) | (wp ? CR0_WP : 0));
        set_control((smep ? CR4_SMEP : 0) | (smap ? CR4_SMAP : 0), CR4_SMEP | CR4_SMAP);
        if (has_nx)
            wrmsr(EFER, (rdmsr(EFER) & ~(u64)NXE) | (nxe ? NXE : 0));
        all_permissions();
        check(name, wrong, 0);
    }
    set_cr0(get_cr0() | CR0_WP);
    set_control(0, CR4_SMEP | CR4_SMAP);
    nxe = has_nx, smep = smap = 0;
}

/* ---- accessed and dirty bits */

static void accessed_and_dirty(void) {
    boot_pml4[1] &= ~A, pdpt[0] &= ~A, pd[0] = (reg)pt | ALL, pt[0] = phys(0) | ALL;
    invlpg(VA(0));
    fault_of(READ, 0, VA(0));
    check("a read sets the accessed bit on all four levels", boot_pml4[1] & pdpt[0] & pd[0] & pt[0] & A, A);
    check("a read leaves the dirty bit", pt[0] & D, 0);
    fault_of(WRITE, 0, VA(0));
    check("a write behind a read sets the dirty bit", pt[0] & D, D);
    check("only the last level has a dirty bit", (boot_pml4[1] | pdpt[0] | pd[0]) & D, 0);
    map(0, phys(0) | ALL);
    fault_of(WRITE, 1, VA(0));
    check("a write sets both bits again after INVLPG", pt[0] & (A | D), A | D);
    map(0, phys(0) | ALL);
    fault_of(FETCH, 1, VA(0));
    check("a fetch sets the accessed bit", pt[0] & (A | D), A);
    map(0, phys(0) | P | US);
    fault_of(WRITE, 1, VA(0));
    check("a write that faults leaves the dirty bit", pt[0] & D, 0);
}

static void read_modify_write(void) {
    PROBE(add_zero, "", "addl $0, 64(%rdi)");
    PROBE(cmpxchg_fails, "mov $1, %eax; mov $2, %ecx", "lock cmpxchgl %ecx, 64(%rdi)");
    PROBE(bit_test, "", "btl $0, 64(%rdi)");
    PROBE(exchange, "", "xchgl %eax, 64(%rdi)");
    map(0, phys(0) | P);
    run_kernel(add_zero, VA(0));
    check_trap("ADD of 0 to a read-only page is a write", PF, E_P | E_W, (reg)add_zero_at);
    run_kernel(cmpxchg_fails, VA(0));
    check_trap("CMPXCHG that fails is a write", PF, E_P | E_W, (reg)cmpxchg_fails_at);
    run_kernel(exchange, VA(0));
    check_trap("XCHG is a write", PF, E_P | E_W, (reg)exchange_at);
    run_kernel(bit_test, VA(0));
    check_trap("BT is a read", NO_TRAP, 0, 0);
    map(0, 0);
    run_kernel(add_zero, VA(0));
    check_trap("ADD to an absent page faults as a write", PF, E_W, (reg)add_zero_at);
}

/* ---- large pages and reserved bits */

static void large_pages(void) {
    reg at = phys(1) + DATA_AT;
    volatile u8 *identity = (u8 *)at;
    pd[1] = P | US | RW | PS;
    *identity = 0x11;
    check("a 2 MiB page reads", *(volatile u8 *)(LARGE + at), 0x11);
    check("a 2 MiB page's read sets A and not D", pd[1] & (A | D), A);
    *(volatile u8 *)(LARGE + at) = 0x22;
    check("a 2 MiB page writes", *identity, 0x22);
    check("a 2 MiB page's write sets D", pd[1] & D, D);
    pd[1] = P | US | PS;
    invlpg(LARGE + 0x1ff000);
    check("INVLPG anywhere in a 2 MiB page drops it", fault_of(WRITE, 1, LARGE + phys(1)), E_P | E_W | E_U);
    pd[1] = (reg)pages & ~0x1fffffull;
    invlpg(LARGE);
    check("an absent 2 MiB page faults", fault_of(READ, 0, LARGE + phys(1)), 0);
    if (!cpu_has(0x80000001, 0, 3, 26)) {
        skip("1 GiB pages", "not in CPUID");
        return;
    }
    pdpt[1] = P | US | RW | PS;
    *identity = 0x33;
    check("a 1 GiB page reads", *(volatile u8 *)(HUGE + at), 0x33);
    check("a 1 GiB page's read sets A and not D", pdpt[1] & (A | D), A);
    *(volatile u8 *)(HUGE + at) = 0x44;
    check("a 1 GiB page writes", *identity, 0x44);
    check("a 1 GiB page's write sets D", pdpt[1] & D, D);
    pdpt[1] = P | RW | PS;
    invlpg(HUGE + 0x3ffff000);
    check("INVLPG anywhere in a 1 GiB page drops it", fault_of(READ, 1, HUGE + phys(1)), E_P | E_U);
}

static void reserved_one(const char *name, volatile u64 *entry, u64 bit, reg page, u64 restore) {
    *entry = restore | bit;
    invlpg(page);
    check(name, fault_of(WRITE, 1, page), E_P | E_W | E_U | E_RSVD);
    *entry = bit;
    invlpg(page);
    check("  and absent it is just absent", fault_of(WRITE, 1, page), E_W | E_U);
    *entry = restore;
    invlpg(page);
}

static void reserved_bits(void) {
    u32 r[4];
    cpuid(0x80000008, 0, r);
    int width = r[0] & 0xff, has_huge = cpu_has(0x80000001, 0, 3, 26);
    u64 pml4e = (reg)pdpt | ALL, pdpte = (reg)pd | ALL, pde = (reg)pt | ALL, pte = phys(0) | ALL, large = ALL | PS;
    reg small = VA(0), in_large = LARGE + phys(0), in_huge = HUGE + phys(0);
    map(0, pte);
    pd[1] = large, pdpt[1] = large;
    reserved_one("bit 7 of a PML4 entry is reserved", (u64 *)boot_pml4 + 1, PS, small, pml4e);
    reserved_one("bit 13 of a 2 MiB entry is reserved", pd + 1, 1 << 13, in_large, large);
    reserved_one("bit 20 of a 2 MiB entry is reserved", pd + 1, 1 << 20, in_large, large);
    if (has_huge) {
        reserved_one("bit 13 of a 1 GiB entry is reserved", pdpt + 1, 1 << 13, in_huge, large);
        reserved_one("bit 29 of a 1 GiB entry is reserved", pdpt + 1, 1 << 29, in_huge, large);
    } else {
        pdpt[1] = (reg)pd | ALL;
        reserved_one("bit 7 of a PDPT entry is reserved without 1 GiB pages", pdpt + 1, PS, HUGE + phys(0) % 4096, pdpte);
    }
    pd[1] = large | 1 << 12;
    invlpg(in_large);
    check("bit 12 of a 2 MiB entry is the PAT's", fault_of(READ, 1, in_large), NONE);
    pd[1] = large;
    map(0, pte | 0xe00 | 0x7full << 52);
    check("bits 9 to 11 and 52 to 58 are ignored", fault_of(READ, 1, small), NONE);
    map(0, pte);
    if (width < 52) {
        u64 above = 1ull << width;
        reserved_one("a PML4 entry above the physical width", (u64 *)boot_pml4 + 1, above, small, pml4e);
        reserved_one("a PDPT entry above the physical width", pdpt, above, small, pdpte);
        reserved_one("a PD entry above the physical width", pd, above, small, pde);
        reserved_one("a PT entry above the physical width", pt, above, small, pte);
        reserved_one("a PT entry with bit 51", pt, 1ull << 51, small, pte);
        reserved_one("a 2 MiB entry above the physical width", pd + 1, above, in_large, large);
    } else
        skip("bits above the physical width", "it is 52");
}

/* ---- what the TLB may keep */

static void translation_caches(void) {
    volatile u8 *window = (u8 *)VA(2) + DATA_AT;
    pages[0][DATA_AT] = 0xa0, pages[1][DATA_AT] = 0xa1;
    map(2, 0);
    check("an absent page faults", fault_of(READ, 0, VA(2)), 0);
    pt[2] = phys(0) | P;
    check("absent pages are not cached", fault_of(READ, 0, VA(2)), NONE);
    pt[2] |= RW;
    fault_of(WRITE, 0, VA(2));
    check("at most one fault tells of a page made writable", fault_of(WRITE, 0, VA(2)), NONE);
    pages[0][DATA_AT] = 0xa0;
    map(2, phys(0) | ALL);
    check("before the change", *window, 0xa0);
    map(2, phys(1) | ALL);
    check("INVLPG shows the change", *window, 0xa1);
    pt[2] = phys(0) | ALL;
    set_cr3(get_cr3());
    check("a CR3 load shows the change", *window, 0xa0);
    map(2, phys(0) | ALL | G);
    check("a global page", *window, 0xa0);
    pt[2] = phys(1) | ALL | G;
    set_cr3(get_cr3());
    reg old = *window;
    check("a CR3 load may keep a global page", old == 0xa0 || old == 0xa1, 1);
    invlpg(VA(2));
    check("INVLPG drops a global page", *window, 0xa1);
    pt[2] = phys(0) | ALL | G;
    set_control(0, CR4_PGE);
    check("clearing CR4.PGE drops global pages", *window, 0xa0);
    pt[2] = phys(1) | ALL | G;
    set_control(CR4_PGE, CR4_PGE);
    check("setting CR4.PGE drops all pages", *window, 0xa1);
    pt[2] = phys(0) | ALL;
    set_cr0(get_cr0() & ~(1ul << 16));
    set_cr0(get_cr0() | CR0_WP);
    invlpg(VA(2));
    /* A directory entry's change, told by INVLPG of an address below it. */
    static volatile u64 other[512] PAGE_ALIGNED;
    other[2] = phys(1) | ALL;
    check("through the first table", *window, 0xa0);
    pd[0] = (reg)other | ALL;
    invlpg(VA(2));
    check("INVLPG drops cached directory entries", *window, 0xa1);
    pd[0] = (reg)pt | ALL;
    set_cr3(get_cr3());
    check("a CR3 load drops cached directory entries", *window, 0xa0);
    PROBE(invlpg_odd, "mov $0x800000000000, %rax", "invlpg (%rax)");
    run_kernel(invlpg_odd, 0);
    check_trap("INVLPG ignores addresses that are not canonical", NO_TRAP, 0, 0);
    USER_PROBE(invlpg_user, "", "invlpg (%rdi)");
    run_user(invlpg_user, 0);
    check_trap("INVLPG wants CPL 0", GP, 0, USER(invlpg_user_at));
}

/* ---- process context identifiers (SDM 3A 4.10.1) */

PROBE(load_cr3, "", "mov %rdi, %cr3");
PROBE(load_cr4, "", "mov %rdi, %cr4");
PROBE(invpcid, "mov (%rdi), %rax; lea 8(%rdi), %rcx", "invpcid (%rcx), %rax");
struct invpcid_operands {
    u64 type, pcid, address;
};

static reg run_invpcid(u64 type, u64 pcid, u64 address) {
    struct invpcid_operands operands = {type, pcid, address};
    run_kernel(invpcid, (reg)&operands);
    return last.vector == NO_TRAP ? NONE : last.vector << 16 | last.error;
}

static void contexts(void) {
    static volatile u64 pml4s[2][512] PAGE_ALIGNED, pdpts[2][512] PAGE_ALIGNED, pds[2][512] PAGE_ALIGNED;
    static volatile u64 pts[2][512] PAGE_ALIGNED;
    const u64 keep = 1ull << 63;
    reg old = get_cr3();
    /* QEMU takes it and then walks tables where there is no memory. */
    if (under_tcg()) {
        skip("CR3 bit 63 is reserved without PCIDs", "this is QEMU's TCG");
    } else {
        run_kernel(load_cr3, keep | old);
        check_trap("CR3 bit 63 is reserved without PCIDs", GP, 0, (reg)load_cr3_at);
    }
    if (!cpu_has(1, 0, 2, 17)) {
        skip("PCID", "not in CPUID");
        return;
    }
    int has_invpcid = cpu_has(7, 0, 1, 10);
    set_cr3(old | 0x18);
    run_kernel(load_cr4, get_cr4() | CR4_PCIDE);
    check_trap("CR4.PCIDE wants PCID 0", GP, 0, (reg)load_cr4_at);
    set_cr3(old);
    set_control(CR4_PCIDE, CR4_PCIDE);
    reg roots[2];
    for (int i = 0; i < 2; i++) {
        pml4s[i][0] = boot_pml4[0];
        pml4s[i][1] = (reg)pdpts[i] | ALL;
        pdpts[i][0] = (reg)pds[i] | ALL;
        pds[i][0] = (reg)pts[i] | ALL;
        pts[i][3] = phys(i) | ALL;
        roots[i] = (reg)pml4s[i] | (i + 5);
        pages[i][DATA_AT] = 0xc0 + i;
    }
    pages[2][DATA_AT] = 0xc2, pages[3][DATA_AT] = 0xc3;
    volatile u8 *window = (u8 *)VA(3) + DATA_AT;
    set_cr3(roots[0]);
    check("CR3 reads back with its PCID", get_cr3(), roots[0]);
    check("PCID 5 sees its page", *window, 0xc0);
    set_cr3(roots[1] | keep);
    check("CR3 bit 63 reads as 0", get_cr3(), roots[1]);
    check("PCID 6 sees its page", *window, 0xc1);
    set_cr3(roots[0] | keep);
    check("PCID 5 sees its page again", *window, 0xc0);
    set_cr3(roots[1] | keep);
    check("PCID 6 sees its page again", *window, 0xc1);
    /* PCID 6 runs while PCID 5's table changes. */
    pts[0][3] = phys(2) | ALL;
    set_cr3(roots[0]);
    check("a load without bit 63 drops the PCID's pages", *window, 0xc2);
    pts[0][3] = phys(3) | ALL;
    invlpg(VA(3));
    check("INVLPG drops a page of the present PCID", *window, 0xc3);
    if (has_invpcid) {
        set_cr3(roots[1] | keep);
        pts[0][3] = phys(0) | ALL;
        check("INVPCID of an address", run_invpcid(0, 5, VA(3)), NONE);
        set_cr3(roots[0] | keep);
        check("INVPCID of an address drops it in another PCID", *window, 0xc0);
        set_cr3(roots[1] | keep);
        pts[0][3] = phys(2) | ALL;
        check("INVPCID of a context", run_invpcid(1, 5, 0), NONE);
        set_cr3(roots[0] | keep);
        check("INVPCID of a context drops its pages", *window, 0xc2);
        pts[0][3] = phys(3) | ALL | G;
        check("INVPCID of everything", run_invpcid(2, 0, 0), NONE);
        check("INVPCID of everything drops pages", *window, 0xc3);
        pts[0][3] = phys(0) | ALL;
        run_invpcid(2, 0, 0);
        check("INVPCID of everything drops global pages", *window, 0xc0);
        set_cr3(roots[1] | keep);
        pts[0][3] = phys(2) | ALL, pts[1][3] = phys(3) | ALL;
        check("INVPCID of all but global pages", run_invpcid(3, 0, 0), NONE);
        check("INVPCID type 3 drops this context", *window, 0xc3);
        set_cr3(roots[0] | keep);
        check("INVPCID type 3 drops other contexts", *window, 0xc2);
        check("INVPCID type 4 is a #GP", run_invpcid(4, 0, 0), GP << 16);
        check("INVPCID with a 13-bit PCID is a #GP", run_invpcid(1, 0x1000, 0), GP << 16);
        check("INVPCID of an address that is not canonical is a #GP", run_invpcid(0, 5, 1ull << 47), GP << 16);
        check("INVPCID of a context ignores the address", run_invpcid(1, 5, 1ull << 47), NONE);
    } else
        skip("INVPCID", "not in CPUID");
    run_kernel(load_cr4, get_cr4() & ~(reg)CR4_PGE);
    check_trap("CR4 loads keep PCIDs", NO_TRAP, 0, 0);
    set_control(CR4_PGE, CR4_PGE);
    pts[0][3] = phys(1) | ALL;
    set_cr3(get_cr3() & ~0xffful);
    check("PCID 0 sees the tables of PCID 5", *window, 0xc1);
    pts[0][3] = phys(2) | ALL;
    set_control(0, CR4_PCIDE);
    check("clearing CR4.PCIDE drops all pages", *window, 0xc2);
    if (has_invpcid) {
        check("INVPCID of PCID 1 without PCIDs is a #GP", run_invpcid(0, 1, VA(3)), GP << 16);
        check("INVPCID of PCID 0 without PCIDs", run_invpcid(0, 0, VA(3)), NONE);
        USER_PROBE(invpcid_user, "", "invpcid (%rdi), %rax");
        set_cr3(old);
        run_user(invpcid_user, 0);
        check_trap("INVPCID wants CPL 0", GP, 0, USER(invpcid_user_at));
    }
    set_cr3(old);
}

/* ---- addresses */

static void canonical(void) {
    const reg hole = 1ul << 47;
    PROBE(read8, "", "movq (%rdi), %rax");
    PROBE(read8_stack, "push %rbp; mov %rdi, %rbp", "movq (%rbp), %rax; pop %rbp");
    PROBE(jump, "", "jmp *%rdi");
    PROBE(scaled, "", "movq (%rdi,%rdi), %rax");
    USER_PROBE(push_user, "mov %rdi, %rsp", "push %rax");
    USER_PROBE(return_user, "push %rdi", "ret");
    run_kernel(read8, hole);
    check_trap("data at 2^47", GP, 0, (reg)read8_at);
    run_kernel(read8, hole - 4);
    check("data across 2^47 from below is a #GP or a #PF below", last.vector == GP || last.vector == PF, 1);
    run_kernel(read8, -hole - 1);
    check_trap("data below -2^47", GP, 0, (reg)read8_at);
    run_kernel(scaled, hole / 2);
    check_trap("the sum is what must be canonical", GP, 0, (reg)scaled_at);
    run_kernel(read8_stack, hole);
    check_trap("the stack segment at 2^47", SS, 0, (reg)read8_stack_at);
    run_user(push_user, hole + 64);
    check_trap("a push at 2^47", SS, 0, USER(push_user_at));
    run_kernel(jump, hole);
    /* SDM 2A, JMP: the target is checked before it is loaded, so RIP is the jump's. */
    check_trap("a jump to 2^47", GP, 0, (reg)jump_at);
    run_user(return_user, hole);
    check_trap("a return to 2^47", GP, 0, USER(return_user_at));
    run_kernel(read8, -hole);
    check_trap("-2^47 is canonical and absent", PF, 0, (reg)read8_at);
}

static void across_pages(void) {
    PROBE(write8, "mov $0x1122334455667788, %rax", "movq %rax, (%rdi)");
    PROBE(read_8, "", "movq (%rdi), %rax; mov %rax, probe_result(%rip)");
    PROBE(xadd, "mov $1, %eax", "lock xaddq %rax, (%rdi)");
    PROBE(push8, "mov %rsp, %rax; mov %rdi, %rsp", "pushq $-1; mov %rax, %rsp");
    reg edge = VA(5) - 4;
    volatile u32 *low = (u32 *)(pages[0] + PAGE - 4), *high = (u32 *)pages[2];
    map(4, phys(0) | ALL);
    map(5, phys(2) | ALL);
    *low = *high = 0;
    run_kernel(write8, edge);
    check("a split write's low half", *low, 0x55667788);
    check("a split write's high half", *high, 0x11223344);
    extern volatile u64 probe_result;
    run_kernel(read_8, edge);
    check("a split read", probe_result, 0x1122334455667788);
    *low = 0xffffffff;
    run_kernel(xadd, edge);
    check("a split locked add carries over", (u64)*high << 32 | *low, 0x1122334500000000);
    *low = 0;
    map(5, phys(2) | P);
    run_kernel(write8, edge);
    check_trap("a split write, second page read-only", PF, E_P | E_W, (reg)write8_at);
    check("its address is the second page", last.cr2, VA(5));
    check("the first page is untouched", *low, 0);
    map(5, 0);
    run_kernel(read_8, edge);
    check_trap("a split read, second page absent", PF, 0, (reg)read_8_at);
    check("its address is the second page too", last.cr2, VA(5));
    map(4, 0);
    run_kernel(read_8, edge);
    check("first page absent: its address is the operand's", last.cr2, edge);
    map(5, phys(2) | ALL);
    run_kernel(write8, edge);
    check("only the first page absent", last.cr2, edge);
    map(4, phys(0) | ALL);
    run_kernel(push8, edge + 8);
    check("a push across pages, low", *low, 0xffffffff);
    check("a push across pages, high", *high, 0xffffffff);

    /* mov $0x12345678, %eax; ret */
    static const u8 code[] = {0xb8, 0x78, 0x56, 0x34, 0x12, 0xc3};
    memcpy(pages[0] + PAGE - 3, code, 3);
    memcpy(pages[2], code + 3, 3);
    run_kernel((void *)(VA(5) - 3), 0);
    check_trap("an instruction across pages", NO_TRAP, 0, 0);
    map(5, nxe ? phys(2) | ALL | NX : 0);
    run_kernel((void *)(VA(5) - 3), 0);
    check_trap("its second page cannot be fetched", PF, nxe ? E_P | E_I : 0, VA(5) - 3);
    check("the fetch's address is the second page", last.cr2, VA(5));
    map(5, phys(2) | ALL);
}
volatile u64 probe_result;

/* ---- faults that are mended and restarted */

static u32 mended;
static void mend(struct frame *f) {
    (void)f;
    int n = (get_cr2() - WINDOW) / 4096;
    if (n < 8 || n >= 12) {
        say("page fault at %x, ip %x\n", get_cr2(), f->ip);
        die("a page fault that nobody expected");
    }
    pt[n] = phys(n - 8) | ALL;
    mended++;
}

static void restarts(void) {
    for (int n = 8; n < 12; n++)
        map(n, 0);
    handlers[PF] = mend;
    *(volatile u64 *)(VA(9) - 4) = 0x0123456789abcdef;
    check("a split write is restarted twice", mended, 2);
    check("and is whole", *(volatile u64 *)(VA(9) - 4), 0x0123456789abcdef);
    for (int n = 8; n < 12; n++)
        map(n, 0);
    mended = 0;
    void *to = (void *)VA(8) + 10;
    reg count = 4 * 4096 - 20;
    asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(0x5a) : "memory");
    check("REP STOSB is restarted on four pages", mended, 4);
    check("REP STOSB ends where it should", (reg)to, VA(12) - 10);
    check("REP STOSB counts to 0", count, 0);
    u32 sum = 0;
    for (reg at = VA(8) + 10; at < VA(12) - 10; at++)
        sum += *(u8 *)at == 0x5a;
    check("REP STOSB wrote every byte", sum, 4 * 4096 - 20);
    map(9, 0);
    mended = 0;
    memcpy(pages[0], "across", 6);
    void *from = (void *)VA(8);
    to = (void *)VA(9) - 3;
    count = 6;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count)::"memory");
    check("REP MOVSB faults once", mended, 1);
    check("REP MOVSB moved what it should", *(u8 *)(VA(9) + 2), 's');
    handlers[PF] = 0;

    PROBE(rep_fault, "mov $100, %ecx; mov %rdi, %rsi; lea pages_target(%rip), %rdi; cld", "rep movsb");
    map(8, phys(0) | ALL);
    map(9, 0);
    handlers[PF] = 0;
    extern volatile u64 at_fault[3];
    extern void keep_registers(struct frame *);
    handlers[PF] = keep_registers;
    run_kernel(rep_fault, VA(9) - 37);
    handlers[PF] = 0;
    check("REP MOVSB stops with RCX at what is left", at_fault[0], 63);
    check("REP MOVSB stops with RSI at the fault", at_fault[1], VA(9));
    check("REP MOVSB stops with RIP at itself", at_fault[2], (reg)rep_fault_at);
}
u8 pages_target[128];
volatile u64 at_fault[3];
void keep_registers(struct frame *f) {
    at_fault[0] = f->rcx, at_fault[1] = f->rsi, at_fault[2] = f->ip;
    f->rcx = 0;
    f->ip += 2;
}

/* ---- accesses that the processor makes by itself */

static void implicit_accesses(void) {
    PROBE(load_es, LOAD_FLAGS, "mov %di, %es");
    USER_PROBE(load_es_user, "", "mov %di, %es");
    /* A table whose last descriptor lies on the next page. */
    const u32 selector = 0x98;
    struct {
        u16 limit;
        reg base;
    } __attribute__((packed)) table = {selector + 7, VA(14) + PAGE - selector};
    memcpy(pages[0] + PAGE - selector, gdt, selector);
    *(u64 *)pages[1] = 0x00cff3000000ffff;
    map(14, phys(0) | P | RW);
    map(15, 0);
    asm volatile("lgdt %0" ::"m"(table));
    run_kernel(load_es, selector);
    check_trap("a descriptor on an absent page", PF, 0, (reg)load_es_at);
    check("at the descriptor's address", last.cr2, VA(15));
    run_user(load_es_user, selector | 3);
    check_trap("CPL 3 reads descriptors as a supervisor", PF, 0, USER(load_es_user_at));
    map(15, phys(1) | P);
    run_user(load_es_user, selector | 3);
    check_trap("from a supervisor's page", USER_END, 0, 0);
    *(u64 *)pages[1] = 0x00cff2000000ffff;
    run_user(load_es_user, selector | 3);
    check_trap("a descriptor's accessed bit is a supervisor's write", PF, E_P | E_W, USER(load_es_user_at));
    map(15, phys(1) | P | RW);
    run_user(load_es_user, selector | 3);
    check_trap("to a writable page", USER_END, 0, 0);
    check("the accessed bit is set", pages[1][5], 0xf3);
    if (cpu_has(7, 0, 1, 20)) {
        map(15, phys(1) | ALL);
        set_control(CR4_SMAP, CR4_SMAP);
        probe_flags = user_flags = 2 | AC_FLAG;
        run_kernel(load_es, selector);
        check_trap("SMAP: an implicit access ignores AC", PF, E_P, (reg)load_es_at);
        run_user(load_es_user, selector | 3);
        check_trap("SMAP: an implicit access at CPL 3", PF, E_P, USER(load_es_user_at));
        probe_flags = user_flags = 2;
        set_control(0, CR4_SMAP);
    } else
        skip("SMAP and implicit accesses", "not in CPUID");
    load_tables();
    asm volatile("mov %0, %%es" ::"r"(KERNEL_DATA));
    USER_PROBE(push_absent, "mov %rdi, %rsp", "push %rax");
    map(13, 0);
    run_user(push_absent, VA(14));
    check_trap("a push to an absent page", PF, E_W | E_U, USER(push_absent_at));
    check("leaves RSP", last.sp, VA(14));
}

void bare_main(void) {
    boot_pml4[1] = (reg)pdpt | ALL;
    pdpt[0] = (reg)pd | ALL;
    pd[0] = (reg)pt | ALL;
    for (u32 i = 0; i < ARRAY_SIZE(pages); i++) {
        pages[i][KERNEL_CODE_AT] = 0xc3;
        pages[i][USER_CODE_AT] = 0xcd;
        pages[i][USER_CODE_AT + 1] = USER_END;
    }
    permissions();
    accessed_and_dirty();
    read_modify_write();
    large_pages();
    reserved_bits();
    translation_caches();
    contexts();
    canonical();
    across_pages();
    restarts();
    implicit_accesses();
}
