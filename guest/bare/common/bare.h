/* The runtime of bare programs: serial output, checks, traps, and what C cannot say about the processor. */
#ifndef BARE_H
#define BARE_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
/* As wide as a register. */
typedef unsigned long reg;

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define PAGE 4096

enum {
    DE = 0, DB = 1, NMI = 2, BP = 3, OF = 4, BR = 5, UD = 6, NM = 7, DF = 8, TS = 10, NP = 11, SS = 12, GP = 13, PF = 14, AC = 17,
};
/* What `last.vector` says when nothing was trapped, and the gate user mode ends with. */
enum { NO_TRAP = 0xfff, USER_END = 0x80 };

/* Selectors of the global descriptor table. In 32-bit programs the 64-bit code segments are 32-bit ones. */
enum {
    KERNEL_CODE = 0x08, KERNEL_DATA = 0x10, KERNEL_CODE32 = 0x18, USER_CODE32 = 0x23, USER_DATA = 0x2b, USER_CODE = 0x33,
    TASK = 0x38, CODE16 = 0x48, DATA16 = 0x50, SYSENTER_BASE = 0x60, FREE_SELECTOR = 0x90,
};

#ifdef __x86_64__
struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax, vector, error, ip, cs, flags, sp, ss;
};
struct tss {
    u32 reserved0;
    u64 sp0, sp1, sp2, reserved1, ist[7], reserved2;
    u16 reserved3, io_map;
} __attribute__((packed));
/* User mode sees the first GiB of memory again from here. */
#define USER_BASE 0x80000000ul
#else
struct frame {
    u32 ds, edi, esi, ebp, esp, ebx, edx, ecx, eax, vector, error, ip, cs, flags, sp, ss;
};
struct tss {
    u32 link, sp0, ss0, sp1, ss1, sp2, ss2, cr3, ip, flags, gpr[8], segments[6], ldt;
    u16 trap, io_map;
} __attribute__((packed));
#define USER_BASE 0ul
#endif
#define USER(pointer) ((reg)(pointer) + USER_BASE)

/* The last trap. */
struct trapped {
    reg vector, error, cr2, ip, cs, flags, sp, ss;
    reg count;
};
extern volatile struct trapped last;
/* A vector's handler; without one a trap is recorded and ends the guarded call. */
extern void (*volatile handlers[256])(struct frame *);
extern u64 gdt[64];
extern struct tss tss;
extern u32 boot_magic, boot_info;
extern reg user_flags, recovery_stack;
extern u8 user_stack[8192], kernel_stack[8192];
extern char trap_stubs[], recovery_point[], image_end[];

int guarded(reg ip, reg argument);
int guarded_user(reg ip, reg argument, reg cs, reg sp);
/* Runs code at CPL 3 from the user's view of memory. */
void run_user(const void *code, reg argument);
void run_kernel(const void *code, reg argument);

void say(const char *format, ...);
/* One check: prints `ok name` or what was wanted. */
void check(const char *name, reg got, reg want);
/* The last trap was this one; `ip` 0 is any. */
void check_trap(const char *name, reg vector, reg error, reg ip);
/* Prints the result and ends the machine: 33 as a process when all checks held. */
void done(void) __attribute__((noreturn));
void die(const char *why) __attribute__((noreturn));
void skip(const char *name, const char *why);
/* Whether the loader's command line has this word. */
int told(const char *word);
/* QEMU's TCG, also below another hypervisor if the command line says tcg: it lets some things pass that end the program. */
int under_tcg(void);
void set_gate(int vector, const void *entry, int type_and_dpl, int ist);
void set_gdt(int selector, u32 base, u32 limit, u32 access, u32 flags);
void load_tables(void);
void bare_main(void);

void *memset(void *to, int byte, unsigned long length);
void *memcpy(void *to, const void *from, unsigned long length);

#define UNUSED __attribute__((unused))
#define LABELLED(name, before, instruction, after)                                                                      \
    extern char name[] UNUSED, name##_at[] UNUSED, name##_next[] UNUSED;                                                \
    asm(".pushsection .text.probes, \"ax\"\n.globl " #name ", " #name "_at, " #name "_next\n" #name ":\n" before "\n"      \
        #name "_at: " instruction "\n" #name "_next: " after "\n.popsection")
/* Code with two labels around one instruction: NAME (to call), NAME_at (the instruction), NAME_next (behind it). */
#define PROBE(name, before, instruction) LABELLED(name, before, instruction, "ret")
/* The same for CPL 3, which ends by the gate. */
#define USER_PROBE(name, before, instruction) LABELLED(name, before, instruction, "int $0x80")
/* One instruction that traps (or not: NO_TRAP, USER_END) with this vector and error code, at itself. */
#define TRAPS(id, name, before, instruction, vector, error)                                                             \
    do {                                                                                                                \
        PROBE(id, before, instruction);                                                                                 \
        run_kernel(id, 0);                                                                                              \
        check_trap(name, vector, error, (int)(vector) == NO_TRAP ? 0 : (reg)id##_at);                                        \
    } while (0)
/* The same where QEMU's TCG does what a processor refuses, and with that takes the program's ground away. */
#define TRAPS_OR_ENDS(id, name, before, instruction, vector, error)                                                     \
    do {                                                                                                                \
        if (under_tcg())                                                                                                \
            skip(name, "QEMU's TCG would do it");                                                                       \
        else                                                                                                            \
            TRAPS(id, name, before, instruction, vector, error);                                                        \
    } while (0)
#define USER_TRAPS(id, name, before, instruction, vector, error)                                                        \
    do {                                                                                                                \
        USER_PROBE(id, before, instruction);                                                                            \
        run_user(id, 0);                                                                                                \
        check_trap(name, vector, error, (int)(vector) == USER_END ? 0 : USER(id##_at));                                      \
    } while (0)

static inline void out8(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 in32(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u64 rdmsr(u32 msr) {
    u32 low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return low | (u64)high << 32;
}
static inline void wrmsr(u32 msr, u64 value) {
    asm volatile("wrmsr" ::"c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}
static inline u64 rdtsc(void) { u32 low, high; asm volatile("rdtsc" : "=a"(low), "=d"(high)); return low | (u64)high << 32; }
static inline void cpuid(u32 leaf, u32 sub, u32 out[4]) {
    asm volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(sub));
}
#define CONTROL_REGISTER(n)                                                                                             \
    static inline reg get_cr##n(void) { reg v; asm volatile("mov %%cr" #n ", %0" : "=r"(v)); return v; }               \
    static inline void set_cr##n(reg v) { asm volatile("mov %0, %%cr" #n ::"r"(v) : "memory"); }
CONTROL_REGISTER(0)
CONTROL_REGISTER(2)
CONTROL_REGISTER(3)
CONTROL_REGISTER(4)
#ifdef __x86_64__
CONTROL_REGISTER(8)
#endif
static inline void invlpg(reg address) { asm volatile("invlpg (%0)" ::"r"(address) : "memory"); }
static inline reg get_flags(void) { reg v; asm volatile("pushf; pop %0" : "=r"(v)); return v; }
static inline void set_flags(reg v) { asm volatile("push %0; popf" ::"r"(v) : "memory", "cc"); }
static inline void interrupts_on(void) { asm volatile("sti" ::: "memory"); }
static inline void interrupts_off(void) { asm volatile("cli" ::: "memory"); }
/* Waits for one interrupt; interrupts are off before and after. */
void wait_interrupt(void);
/* How many interrupts came between its STI and its HLT, where a processor holds them back. */
extern volatile u32 early_interrupts;
static inline void pause(void) { asm volatile("pause" ::: "memory"); }
static inline int cpu_has(u32 leaf, u32 sub, int word, int bit) {
    u32 r[4];
    cpuid(leaf & 0x80000000, 0, r);
    if (r[0] < leaf)
        return 0;
    cpuid(leaf, sub, r);
    return r[word] >> bit & 1;
}

#endif
