/* The runtime of bare programs, for 64-bit and 32-bit ones. */
#include "bare.h"

#include <stdarg.h>

u32 boot_magic, boot_info;
reg user_flags = 2;
u8 user_stack[8192] __attribute__((aligned(16)));
u8 kernel_stack[8192] __attribute__((aligned(16)));
static u8 fault_stack[8192] __attribute__((aligned(16)));
reg recovery_stack;
u32 recovery_active;
volatile struct trapped last;
void (*volatile handlers[256])(struct frame *);
struct tss tss;
static u32 checks, failures;

/* Descriptors: base and limit spread as the manual wants them (SDM 3A 3.4.5), flat ones written out. */
#ifdef __x86_64__
#define CODE_FLAGS 0x00af000000000000ull
#else
#define CODE_FLAGS 0x00cf000000000000ull
#endif
u64 gdt[64] = {
    [1] = 0x00009b000000ffff | CODE_FLAGS, [2] = 0x00cf93000000ffff,
    [3] = 0x00cf9b000000ffff, [4] = 0x00cffb000000ffff, [5] = 0x00cff3000000ffff,
    [6] = 0x0000fb000000ffff | CODE_FLAGS, [9] = 0x00009b000000ffff, [10] = 0x000093000000ffff,
    [12] = 0x00009b000000ffff | CODE_FLAGS, [13] = 0x00cf93000000ffff, [14] = 0x00cffb000000ffff,
    [15] = 0x00cff3000000ffff, [16] = 0x0000fb000000ffff | CODE_FLAGS, [17] = 0x00cff3000000ffff,
};
struct {
    u16 limit;
    reg base;
} __attribute__((packed)) gdt_pointer = {sizeof(gdt) - 1, (reg)gdt}, idt_pointer;

#ifdef __x86_64__
static u64 idt[256][2];
#else
static u64 idt[256][1];
#endif

void *memset(void *to, int byte, unsigned long length) {
    void *start = to;
    asm volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, unsigned long length) {
    void *start = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length)::"memory");
    return start;
}

static void put(char c) {
    while (!(in8(0x3fd) & 0x20))
        ;
    out8(0x3f8, c);
}

static void put_number(u64 value, u32 base) {
    char digits[24];
    int n = 0;
    if (base == 16) {
        do
            digits[n++] = "0123456789abcdef"[value & 15];
        while (value >>= 4);
    } else {
        /* No 64-bit division: 32-bit programs have no library for it. */
        u32 small = value;
        do
            digits[n++] = '0' + small % 10;
        while (small /= 10);
    }
    while (n)
        put(digits[--n]);
}

/* %s, %d (32 bits, unsigned), %x (a register wide), %c. */
void say(const char *format, ...) {
    va_list list;
    va_start(list, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            for (const char *s = va_arg(list, const char *); *s; s++)
                put(*s);
            break;
        case 'd': put_number(va_arg(list, u32), 10); break;
        case 'x': put_number(va_arg(list, reg), 16); break;
        case 'c': put(va_arg(list, int)); break;
        default: put('%');
        }
    }
    va_end(list);
}

void check(const char *name, reg got, reg want) {
    checks++;
    if (got == want) {
        say("ok %s\n", name);
        return;
    }
    failures++;
    say("FAIL %s: want %x got %x\n", name, want, got);
}

void check_trap(const char *name, reg vector, reg error, reg ip) {
    checks++;
    if (last.vector == vector && last.error == error && (!ip || last.ip == ip)) {
        say("ok %s\n", name);
        return;
    }
    failures++;
    say("FAIL %s: want vector %x error %x ip %x got vector %x error %x ip %x cr2 %x\n", name, vector, error, ip,
        last.vector, last.error, last.ip, last.cr2);
}

void skip(const char *name, const char *why) { say("skip %s: %s\n", name, why); }

int told(const char *word) {
    const u32 *info = (u32 *)(reg)boot_info;
    if (!(info[0] & 4))
        return 0;
    for (const char *at = (const char *)(reg)info[4]; *at; at++) {
        const char *w = word;
        for (const char *a = at; *w && *a == *w; a++)
            w++;
        if (!*w)
            return 1;
    }
    return 0;
}

int under_tcg(void) {
    u32 r[4];
    if (told("tcg"))
        return 1;
    cpuid(0x40000000, 0, r);
    return r[1] == 0x54474354 && r[2] == 0x43544743 && r[3] == 0x47435447;
}

void done(void) {
    say("done: %d checks, %d failed\n", checks, failures);
    out32(0xf4, failures || !checks ? 0x11 : 0x10);
    for (;;)
        asm volatile("cli; hlt");
}

void die(const char *why) {
    checks++;
    failures++;
    say("FAIL %s\n", why);
    done();
}

extern char wait_halt[];
asm(".globl wait_interrupt, wait_halt\nwait_interrupt: sti\nwait_halt: hlt\ncli\nret");
volatile u32 early_interrupts;

void trap(struct frame *f) {
    if (f->ip == (reg)wait_halt) {
        /* What it would wait for has come: it must not sleep on. Only an NMI may come here. */
        if (f->vector != NMI)
            __atomic_fetch_add(&early_interrupts, 1, __ATOMIC_SEQ_CST);
        f->ip++;
    }
    if (handlers[f->vector & 255]) {
        handlers[f->vector & 255](f);
        return;
    }
    last.vector = f->vector;
    last.error = f->error;
    last.cr2 = get_cr2();
    last.ip = f->ip;
    last.cs = f->cs;
    last.flags = f->flags;
#ifndef __x86_64__
    if (!(f->cs & 3)) {
        last.sp = (reg)&f->sp;
        last.ss = KERNEL_DATA;
    } else
#endif
    {
        last.sp = f->sp;
        last.ss = f->ss;
    }
    last.count++;
    if (!recovery_active) {
        say("trap %x error %x ip %x cs %x flags %x sp %x cr2 %x\n", (reg)f->vector, (reg)f->error, (reg)f->ip, (reg)f->cs,
            (reg)f->flags, (reg)last.sp, (reg)last.cr2);
        die("unexpected trap");
    }
#ifdef __x86_64__
    f->ip = (reg)recovery_point;
    f->cs = KERNEL_CODE;
    f->flags = 2;
    f->sp = recovery_stack;
    f->ss = KERNEL_DATA;
#else
    asm volatile("mov %0, %%esp; jmp recovery_point" ::"r"(recovery_stack));
    __builtin_unreachable();
#endif
}

void run_kernel(const void *code, reg argument) {
    last.vector = NO_TRAP;
    last.error = last.ip = last.cr2 = 0;
    guarded((reg)code, argument);
}

void run_user(const void *code, reg argument) {
    last.vector = NO_TRAP;
    last.error = last.ip = last.cr2 = 0;
    guarded_user(USER(code), argument, USER_CODE, USER(user_stack + sizeof(user_stack) - 64));
}

void set_gate(int vector, const void *entry, int type_and_dpl, int ist) {
    u64 address = (reg)entry;
    idt[vector][0] = (address & 0xffff) | (u64)KERNEL_CODE << 16 | (u64)ist << 32 | (u64)type_and_dpl << 40 |
                     (address >> 16 & 0xffff) << 48;
#ifdef __x86_64__
    idt[vector][1] = address >> 32;
#endif
}

void set_gdt(int selector, u32 base, u32 limit, u32 access, u32 flags) {
    gdt[selector >> 3] = (limit & 0xffff) | (u64)(base & 0xffffff) << 16 | (u64)access << 40 |
                         (u64)(limit >> 16 & 15) << 48 | (u64)flags << 52 | (u64)(base >> 24) << 56;
}

/* The tables of the processor that calls; the task register is vCPU 0's alone. */
void load_tables(void) { asm volatile("lgdt gdt_pointer; lidt idt_pointer"); }

void setup(void) {
    out8(0x3f9, 0);
    out8(0x3fb, 3);
    /* An old PC's interrupt controllers, where there are some, stay silent. */
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    for (int v = 0; v < 256; v++)
        set_gate(v, trap_stubs + 16 * v, v == USER_END ? 0xee : 0x8e, 0);
    idt_pointer.limit = sizeof(idt) - 1;
    idt_pointer.base = (reg)idt;
    tss.sp0 = (reg)(kernel_stack + sizeof(kernel_stack));
    tss.io_map = sizeof(tss);
    set_gdt(TASK, (reg)&tss, sizeof(tss) - 1, 0x89, 0);
#ifdef __x86_64__
    gdt[(TASK >> 3) + 1] = 0;
    tss.ist[0] = (reg)(fault_stack + sizeof(fault_stack));
    set_gate(DF, trap_stubs + 16 * DF, 0x8e, 1);
#else
    tss.ss0 = KERNEL_DATA;
    (void)fault_stack;
#endif
    load_tables();
    asm volatile("ltr %w0" ::"r"(TASK));
    if (boot_magic != 0x2badb002)
        die("the loader's magic value is not multiboot's");
}
