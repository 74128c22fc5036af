/* Code that is written while it is used (SDM 3A 8.1.3): by itself, through another mapping, across pages, by another
 * processor. */
#include "common/smp.h"

#define PAGE_ALIGNED __attribute__((aligned(4096)))
extern u64 boot_pml4[512];
static volatile u64 pdpt[512] PAGE_ALIGNED, pd[512] PAGE_ALIGNED, pt[512] PAGE_ALIGNED;
static u8 pages[3][PAGE] PAGE_ALIGNED;
#define VA(n) ((1ul << 39) + (n) * 4096ul)
typedef u32 (*code)(u32);

/* mov $value, %eax; ret */
static void put_code(u8 *at, u32 value) {
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static void map(int n, reg physical) {
    pt[n] = physical | 3;
    invlpg(VA(n));
}

static void by_itself(void) {
    u32 got;
    /* A store into the next instruction. The manual promises it only with a jump between; every processor does it. */
    asm volatile("movb $0x22, 1f+1(%%rip)\n 1: mov $0x11, %%eax\n movb $0x11, 1b+1(%%rip)" : "=a"(got)::"memory");
    check("a store into the next instruction", got, 0x22);
    asm volatile("movb $0x22, 1f+1(%%rip)\n jmp 1f\n 1: mov $0x11, %%eax\n movb $0x11, 1b+1(%%rip)" : "=a"(got)::"memory");
    check("a store and a jump", got, 0x22);
    u32 sum = 0, i = 0;
    asm volatile("1: mov %1, 2f+1(%%rip)\n inc %1\n 2: mov $0x12345678, %%eax\n add %%eax, %0\n cmp $1000, %1\n jne 1b"
                 : "+r"(sum), "+r"(i)::"eax", "cc", "memory");
    check("a loop that writes its own operand", sum, 999 * 1000 / 2);
    /* REP STOSB over the instructions behind it: they become NOPs. */
    asm volatile("lea 1f(%%rip), %%rdi\n mov $0x90, %%eax\n mov $5, %%ecx\n xor %%edx, %%edx\n cld\n rep stosb\n"
                 "1: mov $0x55, %%edx\n" : "=d"(got)::"rax", "rcx", "rdi", "cc", "memory");
    check("REP STOSB over what follows", got, 0);
    static u8 nops[16];
    memset(nops, 0x90, sizeof(nops));
    u8 *from = nops;
    asm volatile("lea 1f(%%rip), %%rdi\n mov $5, %%ecx\n xor %%edx, %%edx\n cld\n rep movsb\n"
                 "1: mov $0x55, %%edx\n" : "=d"(got), "+S"(from)::"rcx", "rdi", "cc", "memory");
    check("REP MOVSB over what follows", got, 0);
    asm volatile("pxor %%xmm0, %%xmm0\n xor %%edx, %%edx\n jmp 1f\n .balign 16\n"
                 "1: movdqu 2f(%%rip), %%xmm0\n movdqu %%xmm0, 3f(%%rip)\n 3: mov $0x55, %%edx\n .skip 11, 0x90\n jmp 4f\n"
                 "2: .skip 16, 0x90\n 4:" : "=d"(got)::"memory");
    check("a vector store over what follows", got, 0);
    asm volatile("xor %%edx, %%edx\n mov $0x9090, %%eax\n lock xchgw %%ax, 1f(%%rip)\n 1: .byte 0xb2, 0x55\n" : "=d"(got)::"eax", "memory");
    check("XCHG over what follows", got, 0);
    asm volatile("lea 1f+8(%%rip), %%rax\n mov %%rsp, %%rcx\n mov %%rax, %%rsp\n xor %%edx, %%edx\n mov $-1, %%rbx\n"
                 "mov $0x9090909090909090, %%rbx\n push %%rbx\n 1: mov $0x55, %%edx\n .byte 0x90, 0x90, 0x90\n mov %%rcx, %%rsp\n"
                 : "=d"(got)::"rax", "rcx", "rbx", "memory");
    check("a push over what follows", got, 0);
}

static void by_calls(void) {
    u8 *at = pages[0] + 100;
    put_code(at, 1);
    check("fresh code", ((code)at)(0), 1);
    put_code(at, 2);
    check("written again", ((code)at)(0), 2);
    at[3] = 0x7f;
    check("one byte of it", ((code)at)(0), 0x7f0002);
    *(volatile u16 *)(at - 1) = 0xb990; /* mov $..., %ecx now: EAX is what it was, the old value */
    u32 kept;
    asm volatile("mov $77, %%eax; call *%1" : "=a"(kept) : "r"(at) : "ecx", "memory");
    check("a word over its first byte", kept, 77);
    u32 wrong = 0;
    for (u32 i = 0; i < 2000; i++) {
        put_code(at, i * 3);
        wrong += ((code)at)(0) != i * 3;
    }
    check("two thousand versions", wrong, 0);
    /* Data beside code: writes to it must not harm. */
    volatile u32 *data = (u32 *)(pages[0] + 128);
    put_code(at, 5);
    wrong = 0;
    for (u32 i = 0; i < 2000; i++) {
        *data = i;
        wrong += ((code)at)(0) != 5 || *data != i;
    }
    check("data in the same line as code", wrong, 0);
}

static void other_mappings(void) {
    u8 *at = pages[0] + 200;
    put_code(at, 10);
    code same = (code)at, user_view = (code)USER(at), window = (code)(VA(0) + 200);
    map(0, (reg)pages[0]);
    check("three views agree", same(0) + user_view(0) + window(0), 30);
    put_code((u8 *)USER(at), 11);
    check("written through the second, run through the first", same(0), 11);
    check("and through the third", window(0), 11);
    put_code((u8 *)VA(0) + 200, 12);
    check("written through the third", same(0) + user_view(0), 24);
    put_code(pages[1] + 200, 20);
    check("before the page changes", window(0), 12);
    map(0, (reg)pages[1]);
    check("another page at the same address", window(0), 20);
    map(0, (reg)pages[0]);
    put_code(at, 13);
    check("and back, rewritten", window(0), 13);
    put_code(pages[1] + 200, 21);
    map(0, (reg)pages[1]);
    check("rewritten while it was away", window(0), 21);
}

static void across_pages(void) {
    /* One instruction over two pages that are not neighbours in memory: two bytes in the first, four behind. */
    map(0, (reg)pages[2]);
    map(1, (reg)pages[0]);
    u8 whole[6];
    code crossing = (code)(VA(1) - 2);
    put_code(whole, 0x11223344);
    memcpy(pages[2] + PAGE - 2, whole, 2);
    memcpy(pages[0], whole + 2, 4);
    check("an instruction across pages", crossing(0), 0x11223344);
    pages[0][2] = 0x99;
    check("its second page was written", crossing(0), 0x99223344);
    pages[2][PAGE - 1] = 0x88;
    check("its first page was written", crossing(0), 0x99223388);
    put_code(whole, 0x55667788);
    memcpy(pages[1], whole + 2, 4);
    map(1, (reg)pages[1]);
    check("its second page was mapped anew", crossing(0), 0x55667788);
    pages[0][2] = 0x01;
    check("the page that was left is of no matter", crossing(0), 0x55667788);
    pages[1][1] = 0x02;
    check("the page that came is", crossing(0), 0x55027788);
    /* A block that runs over the edge: NOPs, then the instruction. */
    memset(pages[2] + PAGE - 40, 0x90, 38);
    code block = (code)(VA(1) - 40);
    check("a block across pages", block(0), crossing(0));
    pages[1][0] = 0x44;
    check("rewritten behind the edge", block(0) >> 8 & 0xff, 0x44);
}

/* ---- another processor writes */

static u8 patched[64] __attribute__((aligned(64)));
static volatile u32 version, ran, stop, mixed, stale;
static u32 writer;

static void cross(u32 cpu) {
    if (cpu == writer) {
        for (u32 i = 1; i <= 2000; i++) {
            /* An aligned store of the whole operand: who runs it sees the old or the new one. */
            *(volatile u32 *)(patched + 4) = (i & 0xff) * 0x01010101u;
            version = i;
            if (i % 16 == 0)
                for (u32 seen = ran; ran - seen < 3;)
                    pause();
        }
        stop = 1;
        return;
    }
    while (!stop) {
        u32 least = version, r[4];
        cpuid(0, 0, r); /* serializes: the code from here on is at least as new as the version */
        u32 value = ((code)(patched + 3))(0);
        if (value != (value & 0xff) * 0x01010101u)
            atomic_add(&mixed, 1);
        /* Versions count modulo 256 in each byte; the writer waits often enough to tell. */
        if ((u8)(value - least) >= 128)
            atomic_add(&stale, 1);
        ran++;
    }
}

static void by_another(void) {
    smp_start();
    if (cpus == 1) {
        skip("cross-modifying code", "there is one processor");
        return;
    }
    put_code(patched + 3, 0);
    writer = apic_id();
    on_all(cross);
    check("cross-modified code is old or new", mixed, 0);
    check("never older than what a serializing instruction saw", stale, 0);
    check("it ran", ran > 100, 1);
}

void bare_main(void) {
    boot_pml4[1] = (reg)pdpt | 3;
    pdpt[0] = (reg)pd | 3;
    pd[0] = (reg)pt | 3;
    by_itself();
    by_calls();
    other_mappings();
    across_pages();
    by_another();
}
