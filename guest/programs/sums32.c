/*
 * A 32-bit Linux program that uses what 32-bit programs use and 64-bit ones do not: `int 0x80`, the vDSO's system call
 * entry (SYSENTER or what the kernel chose), x87 arithmetic, a thread-local segment in GS, pushes of all registers, and
 * 64-bit compare-and-swap. Prints one line with a checksum of each; the lines are the same on every processor.
 */
#include <stddef.h>
#include <stdint.h>

enum { SYS_exit = 1, SYS_write = 4, SYS_getpid = 20, SYS_set_thread_area = 243, AT_SYSINFO = 32 };

struct user_desc {
    unsigned entry_number, base_addr, limit, flags;
};

static uint32_t vdso_entry;

static int int80(int number, int a, const void *b, int c) {
    int result;
    asm volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}

static int by_vdso(int number) {
    int result;
    asm volatile("call *%2" : "=a"(result) : "a"(number), "m"(vdso_entry) : "memory", "cc");
    return result;
}

static uint32_t mix(uint32_t hash, uint32_t value) { return (hash ^ value) * 16777619u; }

static uint32_t integers(void) {
    uint32_t hash = 2166136261u, x = 88675123u;
    for (int i = 0; i < 20000; i++) {
        x ^= x << 13, x ^= x >> 17, x ^= x << 5;
        uint64_t wide = (uint64_t)x * (x >> 3) + i;
        uint32_t quotient, remainder;
        asm("divl %4" : "=a"(quotient), "=d"(remainder) : "a"(x), "d"(0), "r"((x >> 9) | 1) : "cc");
        hash = mix(mix(mix(mix(hash, wide), wide >> 32), quotient), remainder);
    }
    return hash;
}

/*
 * BCD adjustments and the whole-register pushes exist in 32-bit code only. The adjustments read CF and AF, which some
 * of them leave undefined, so an addition that defines both goes before each such reader.
 */
static uint32_t legacy(void) {
    uint32_t hash = 2166136261u;
    for (uint32_t i = 0; i < 2000; i++) {
        uint32_t ax = i * 40503u;
        asm volatile("addb $3, %%al; daa; aas; aam; addb %%ah, %%al; das; aaa; aad $7" : "+a"(ax)::"cc");
        asm volatile("pushal; roll $5, 28(%%esp); popal" : "+a"(ax)::"cc", "memory");
        hash = mix(hash, ax);
    }
    return hash;
}

static uint32_t x87(void) {
    union { double value; uint32_t words[2]; } u;
    long double sum = 0;
    for (int i = 1; i < 5000; i++) {
        long double x = i, root;
        asm("fsqrt" : "=t"(root) : "0"(x));
        sum += root / (x + 1) - 1 / root;
    }
    u.value = sum;
    return mix(mix(2166136261u, u.words[0]), u.words[1]);
}

static uint32_t exchange(void) {
    static volatile uint64_t cell = 1;
    for (int i = 0; i < 3000; i++) {
        uint64_t old, new;
        do {
            old = cell;
            new = (old << 7 | old >> 57) + i;
        } while (!__sync_bool_compare_and_swap(&cell, old, new));
    }
    return mix(mix(2166136261u, cell), cell >> 32);
}

static uint32_t thread_segment(void) {
    static uint32_t block[4] = {11, 22, 33, 44};
    struct user_desc area = {.entry_number = -1, .base_addr = (uint32_t)block, .limit = 0xfffff, .flags = 0x51};
    uint32_t third;
    if (int80(SYS_set_thread_area, (int)&area, NULL, 0) != 0) return 0;
    asm volatile("movw %w1, %%gs; movl %%gs:8, %0" : "=r"(third) : "r"(area.entry_number * 8 + 3));
    return third;
}

static uint32_t system_calls(void) {
    int pid = int80(SYS_getpid, 0, NULL, 0), wrong = 0;
    for (int i = 0; i < 200; i++) wrong += by_vdso(SYS_getpid) != pid;
    return wrong;
}

static void print(const char *name, uint32_t value) {
    char line[64], *end = line;
    while (*name) *end++ = *name++;
    *end++ = ' ';
    for (int shift = 28; shift >= 0; shift -= 4) *end++ = "0123456789abcdef"[value >> shift & 15];
    *end++ = '\n';
    int80(SYS_write, 1, line, end - line);
}

__attribute__((used)) static void start(uint32_t *stack) {
    uint32_t *word = stack + stack[0] + 2;
    while (*word++) continue;
    for (; word[0]; word += 2)
        if (word[0] == AT_SYSINFO) vdso_entry = word[1];
    print("integers", integers());
    print("legacy", legacy());
    print("x87", x87());
    print("exchange", exchange());
    print("thread-segment", thread_segment());
    print("system-call-errors", vdso_entry ? system_calls() : 0);
    int80(SYS_exit, 0, NULL, 0);
}

asm(".globl _start\n_start: movl %esp, %eax; andl $-16, %esp; subl $12, %esp; pushl %eax; call start");
