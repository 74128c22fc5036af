/* Code that gives a translator no rest: more of it than any cache holds, entered in the middle of instructions, at addresses
 * that are none, in device memory, in pages whose rights change all the time. All of it from a fixed seed. */
#include "common/smp.h"

#define PAGE_ALIGNED __attribute__((aligned(4096)))
extern u64 boot_pml4[512];
static volatile u64 pdpt[512] PAGE_ALIGNED, pd[512] PAGE_ALIGNED, pt[512] PAGE_ALIGNED;
static u8 arena[64 * PAGE] PAGE_ALIGNED;
#define VA(n) ((1ul << 39) + (n) * 4096ul)
#define NX (1ull << 63)
typedef u32 (*code)(u32);

static u32 seed = 20251125;
static u32 dice(void) {
    seed = seed * 1664525 + 1013904223;
    return seed >> 8 ^ seed << 13;
}

static u8 *put(u8 *at, u8 byte, u32 word) {
    *at++ = byte;
    memcpy(at, &word, 4);
    return at + 4;
}

/* Some instructions on EAX, and what they make of `value`. */
static u32 random_function(u8 *at, u32 value) {
    *at++ = 0x89; /* mov %edi, %eax */
    *at++ = 0xf8;
    for (u32 left = 1 + dice() % 24; left; left--) {
        u32 word = dice();
        switch (dice() % 5) {
        case 0: at = put(at, 0x05, word); value += word; break;
        case 1: at = put(at, 0x35, word); value ^= word; break;
        case 2: *at++ = 0x69; at = put(at, 0xc0, word); value *= word; break;
        case 3:
            *at++ = 0xc1; /* rol $count, %eax */
            *at++ = 0xc0;
            word = 1 + word % 31;
            *at++ = word;
            value = value << word | value >> (32 - word);
            break;
        case 4: /* test $word, %al; jz over; not %eax */
            *at++ = 0xa8;
            *at++ = (u8)word;
            *at++ = 0x74;
            *at++ = 2;
            *at++ = 0xf7;
            *at++ = 0xd0;
            if (value & word & 0xff)
                value = ~value;
        }
    }
    *at = 0xc3;
    return value;
}

static void more_than_a_cache_holds(void) {
    u32 wrong = 0;
    for (u32 round = 0; round < 40000; round++) {
        u8 *at = arena + dice() % (sizeof(arena) - 256);
        u32 argument = dice(), want = random_function(at, argument);
        for (int again = 0; again < 4; again++)
            wrong += ((code)at)(argument) != want;
    }
    check("forty thousand functions", wrong, 0);
}

static void middles_of_instructions(void) {
    u32 wrong = 0;
    for (u32 round = 0; round < 3000; round++) {
        /* mov $0xc3NNc083, %eax; ret: one byte on it is add $NN, %eax; ret. */
        u8 *at = arena + dice() % (sizeof(arena) - 16), number = dice() % 128;
        u32 word = 0xc300c083 | (u32)number << 16;
        *put(at, 0xb8, word) = 0xc3;
        u32 sum;
        asm volatile("mov $5, %%eax; call *%1" : "=&a"(sum) : "r"(at + 1) : "memory");
        wrong += sum != 5u + number;
        wrong += ((code)at)(0) != word;
    }
    check("a function in the middle of an instruction", wrong, 0);
}

PROBE(jump_there, "", "jmp *%rdi");
PROBE(call_there, "", "call *%rdi");
PROBE(return_there, "", "push %rdi; ret");

static void no_addresses(void) {
    static const char *const ways[] = {jump_there, call_there, return_there};
    u32 wrong = 0;
    for (u32 round = 0; round < 3000; round++) {
        reg address = (reg)dice() << 32 | dice();
        address = (address & ~(3ul << 47)) | 1ul << (47 + round % 2);
        run_kernel(ways[round % 3], address);
        wrong += last.vector != GP || last.error != 0;
    }
    check("branches to addresses that are not canonical", wrong, 0);
    wrong = 0;
    for (u32 round = 0; round < 3000; round++) {
        reg address = VA(256 + dice() % 256) + dice() % PAGE;
        run_kernel(ways[round % 3], address);
        wrong += last.vector != PF || last.cr2 != address || last.ip != address || last.error & 1;
    }
    check("branches to pages that are not there", wrong, 0);
}

static void device_memory(void) {
    if (under_tcg()) {
        skip("code in a hole of memory", "QEMU's TCG gives up");
        return;
    }
    /* All ones are no instruction. */
    u32 wrong = 0;
    pt[7] = 0xd0000000 | 3;
    invlpg(VA(7));
    for (u32 round = 0; round < 1000; round++) {
        reg address = VA(7) + dice() % (PAGE - 16);
        run_kernel((void *)address, 0);
        wrong += last.vector != UD || last.ip != address;
    }
    check("code in a hole of memory", wrong, 0);
}

static void rights_come_and_go(void) {
    u32 wrong = 0, faults = 0;
    for (u32 round = 0; round < 6000; round++) {
        u32 page = dice() % 4, offset = dice() % 3000, argument = dice();
        u8 *at = arena + page * PAGE + offset;
        int execute = dice() & 1, write = dice() & 1;
        u32 want = random_function(at, argument);
        pt[page] = (reg)(arena + page * PAGE) | 1 | (write ? 2 : 0) | (execute ? 0 : NX);
        invlpg(VA(page));
        u8 *there = (u8 *)(VA(page) + offset);
        if (write) {
            /* Over its first instruction, by the mapping that may be run: mov %edi, %eax becomes xor %eax, %eax. */
            want = 0;
            there[0] = 0x31;
            there[1] = 0xc0;
            there[2] = 0xc3;
        }
        if (execute) {
            wrong += ((code)there)(argument) != want;
        } else {
            run_kernel(there, argument);
            wrong += last.vector != PF || last.error != 0x11 || last.cr2 != (reg)there;
            faults++;
        }
    }
    check("pages that are executable and writable by turns", wrong, 0);
    check("and not so half of the time", faults > 2000, 1);
}

void bare_main(void) {
    load_tables();
    wrmsr(0xc0000080, rdmsr(0xc0000080) | 1u << 11);
    pdpt[0] = (reg)pd | 3;
    pd[0] = (reg)pt | 3;
    boot_pml4[1] = (reg)pdpt | 3;
    set_cr3(get_cr3());
    more_than_a_cache_holds();
    middles_of_instructions();
    no_addresses();
    device_memory();
    rights_come_and_go();
    done();
}
