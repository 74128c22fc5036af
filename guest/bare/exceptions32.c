/* Exceptions and segments of 32-bit protected mode (SDM 3A, chapters 3, 5, 6 and 7). */
#include "common/capture.h"

static u8 arena[16384] __attribute__((aligned(4096)));
static struct {
    u16 limit;
    reg base;
} __attribute__((packed)) idt_register;
static u64 *gate_of(int vector) { return (u64 *)idt_register.base + vector; }


static void only_32_bits(void) {
    PROBE(into_set, "mov $0x7fffffff, %eax; inc %eax", "into");
    run_kernel(into_set, 0);
    check_trap("INTO with OF is a trap", OF, 0, (reg)into_set_next);
    TRAPS(into_clear, "INTO without OF", "xor %eax, %eax", "into", NO_TRAP, 0);
    TRAPS(bound_in, "BOUND inside", "push $20; push $10; mov $20, %eax", "bound %eax, (%esp); add $8, %esp", NO_TRAP, 0);
    TRAPS(bound_above, "BOUND above", "push $20; push $10; mov $21, %eax", "bound %eax, (%esp)", BR, 0);
    TRAPS(bound_below, "BOUND is signed", "push $20; push $10; mov $-1, %eax", "bound %eax, (%esp)", BR, 0);
    TRAPS(aam_zero, "AAM 0", "", "aam $0", DE, 0);
    TRAPS(salc, "SALC", "", ".byte 0xd6", NO_TRAP, 0);
    TRAPS(ud2, "UD2", "", "ud2", UD, 0);
    PROBE(int_3, "", "int3");
    run_kernel(int_3, 0);
    check_trap("INT3 is a trap", BP, 0, (reg)int_3_next);
    USER_TRAPS(into_user, "INTO at CPL 3 through a gate of DPL 0", "mov $0x7fffffff, %eax; inc %eax", "into", GP, OF * 8 + 2);
    USER_TRAPS(hlt_user, "HLT at CPL 3", "", "hlt", GP, 0);
    USER_TRAPS(int_user, "INT through a gate of DPL 0", "", "int $0x70", GP, 0x70 * 8 + 2);
}

/* ---- limits and types */

/* One access through FS, whose descriptor is the free one. */
PROBE(fs_read4, "mov 4(%esp), %edx; mov $0x90, %ecx; mov %ecx, %fs", "movl %fs:(%edx), %eax");
PROBE(fs_write1, "mov 4(%esp), %edx; mov $0x90, %ecx; mov %ecx, %fs", "movb $0, %fs:(%edx)");

static void expect_fs(const char *name, const char *code, const char *at, reg address, int fine) {
    run_kernel(code, address);
    if (fine)
        check_trap(name, NO_TRAP, 0, 0);
    else
        check_trap(name, GP, 0, (reg)at);
}
#define READS(name, address, fine) expect_fs(name, fs_read4, fs_read4_at, address, fine)
#define WRITES(name, address, fine) expect_fs(name, fs_write1, fs_write1_at, address, fine)

static void limits(void) {
    reg base = (reg)arena;
    set_gdt(FREE_SELECTOR, base, 0xfff, 0x93, 4);
    *(volatile u32 *)(arena + 0xffc) = 0x12345678;
    READS("the last four bytes of a segment", 0xffc, 1);
    READS("one byte over its end", 0xffd, 0);
    READS("the end of the address space", 0xfffffffe, 0);
    WRITES("a write behind the end", 0x1000, 0);
    set_gdt(FREE_SELECTOR, base, 0, 0x93, 0xc);
    READS("a limit in pages", 0xffc, 1);
    READS("and one byte more", 0xffd, 0);
    set_gdt(FREE_SELECTOR, base, 0xfff, 0x97, 4);
    READS("expand-down: at the limit", 0xfff, 0);
    READS("expand-down: above it", 0x1000, 1);
    READS("expand-down: up to 4 GiB", 0xfffffffc, 1);
    READS("expand-down: at 0", 0, 0);
    set_gdt(FREE_SELECTOR, base, 0xfff, 0x97, 0);
    READS("expand-down of 16 bits: up to 64 KiB", 0xfffc, 1);
    READS("expand-down of 16 bits: not over it", 0xfffd, 0);
    set_gdt(FREE_SELECTOR, base, 0xfffff, 0x91, 0xc);
    READS("a read-only segment reads", 0, 1);
    WRITES("a read-only segment does not write", 0, 0);
    set_gdt(FREE_SELECTOR, base, 0xfffff, 0x9b, 0xc);
    READS("readable code reads", 0, 1);
    WRITES("readable code does not write", 0, 0);
    TRAPS(fs_exec_only, "code that only runs cannot be loaded", "movb $0x99, gdt+0x95; mov $0x90, %eax", "mov %eax, %fs", GP, 0x90);
    TRAPS(fs_null, "a null segment", "xor %eax, %eax; mov %eax, %fs", "movl %fs:0, %eax", GP, 0);

    /* The same on the stack is #SS. */
    set_gdt(FREE_SELECTOR, 0, 0x1ff, 0x93, 0xc);
    TRAPS(ss_limit, "a stack access behind the limit", "mov $0x90, %eax; mov %eax, %ss; mov $0x1ffffd, %ebp", "movl (%ebp), %eax", SS, 0);
    TRAPS(ss_limit_ds, "the same address in another segment", "mov $0x1ffffd, %ebp", "movl %ds:(%ebp), %eax", NO_TRAP, 0);
    asm volatile("mov %0, %%ss" ::"r"(KERNEL_DATA));

    /* A jump out of the code segment: the target is checked by the jump. */
    set_gdt(FREE_SELECTOR, 0, 0x1ff, 0x9b, 0xc);
    TRAPS(jump_out, "a far jump behind the limit", "", "ljmp $0x90, $0x300000", GP, 0);
    TRAPS(jump_data, "a far jump to data", "", "ljmp $0x10, $0", GP, 0x10);
    TRAPS(jump_null, "a far jump to null", "", "ljmp $0, $0", GP, 0);
    TRAPS(jump_outer, "a far jump to CPL 3", "", "ljmp $0x23, $0", GP, 0x20);
    set_gdt(FREE_SELECTOR, 0, 0xfffff, 0x1b, 0xc);
    TRAPS(jump_absent, "a far jump to a segment that is not present", "", "ljmp $0x90, $0", NP, 0x90);
    TRAPS(call_absent, "a far call to it", "", "lcall $0x90, $0", NP, 0x90);
    TRAPS(return_absent, "a far return to it", "push $0x90; push $0", "lret", NP, 0x90);
    set_gdt(FREE_SELECTOR, 0, 0xfffff, 0x13, 0xc);
    TRAPS(ds_absent, "DS not present", "mov $0x90, %eax", "mov %eax, %ds", NP, 0x90);
    TRAPS(ss_absent, "SS not present", "mov $0x90, %eax", "mov %eax, %ss", SS, 0x90);
    TRAPS(les_limit, "LES behind the table", "push $0x208; push $0", "les (%esp), %eax", GP, 0x208);
    TRAPS(ss_null, "a null SS", "xor %eax, %eax", "mov %eax, %ss", GP, 0);

    /* Conforming code keeps the CPL; what does not conform wants it equal. */
    set_gdt(FREE_SELECTOR, 0, 0xfffff, 0x9f, 0xc);
    USER_TRAPS(conforming, "conforming code of CPL 0 from CPL 3", "", "ljmp $0x90, $1f; 1: mov %cs, %eax", USER_END, 0);
    check("keeps the CPL", last.cs, FREE_SELECTOR | 3);
    USER_TRAPS(not_conforming, "other code of CPL 0 from CPL 3", "", "ljmp $0x08, $0", GP, 0x08);
}

static void looking_up(void) {
    u32 rights, limit, fine;
    asm volatile("lar %2, %0; setz %b1; movzbl %b1, %1" : "=&r"(rights), "=&q"(fine) : "r"((u32)KERNEL_DATA));
    /* Bits 16 to 19 are undefined. */
    check("LAR", fine ? rights & 0xf0ff00 : 0, 0x00c09300);
    asm volatile("lsl %2, %0; setz %b1; movzbl %b1, %1" : "=&r"(limit), "=&q"(fine) : "r"((u32)KERNEL_DATA));
    check("LSL", fine ? limit : 0, 0xffffffff);
    asm volatile("lsl %2, %0; setz %b1; movzbl %b1, %1" : "=&r"(limit), "=&q"(fine) : "r"((u32)TASK));
    check("LSL of a task", fine ? limit : 0, sizeof(struct tss) - 1);
    asm volatile("mov $0x208, %%ecx; lar %%ecx, %0; setz %b1; movzbl %b1, %1" : "=&r"(rights), "=&q"(fine)::"ecx");
    check("LAR behind the table", fine, 0);
    asm volatile("verw %w1; setz %b0; movzbl %b0, %0" : "=&q"(fine) : "r"(KERNEL_CODE));
    check("VERW of code", fine, 0);
    asm volatile("verr %w1; setz %b0; movzbl %b0, %0" : "=&q"(fine) : "r"(KERNEL_CODE));
    check("VERR of code", fine, 1);
    u32 selector = 0x10, lower = 3;
    asm volatile("arpl %w2, %w1; setz %b0; movzbl %b0, %0" : "=&q"(fine), "+r"(selector) : "r"(lower));
    check("ARPL raises the RPL", fine ? selector : 0, 0x13);
}

/* ---- stack switches */

static void stack_switches(void) {
    USER_PROBE(int70, "mov %esp, %esi", "int $0x70");
    handlers[0x70] = capture;
    set_gate(0x70, trap_stubs + 16 * 0x70, 0xee, 0);
    user_flags = 2 | 0x8d5;
    run_user(int70, 0);
    user_flags = 2;
    check("INT from CPL 3 takes the TSS's stack", seen_end, tss.sp0);
    check("its SS", seen_ss, KERNEL_DATA);
    check("the frame has CPL 3's SS", seen.ss, USER_DATA);
    check("its ESP", seen.sp, seen.esi);
    check("its CS", seen.cs & 0xffff, USER_CODE);
    check("its flags", seen.flags, 2 | 0x8d5);
    check("its EIP", seen.ip, (reg)int70_next);
    set_gate(0x70, trap_stubs + 16 * 0x70, 0x8e, 0);
    PROBE(int70_same, "", "int $0x70");
    run_kernel(int70_same, 0);
    check("INT at CPL 0 pushes no stack", seen.ip == (reg)int70_same_next && (seen.cs & 0xffff) == KERNEL_CODE, 1);

    /* A gate to CPL 1: its stack can be bad while CPL 0's is good. */
    set_gdt(FREE_SELECTOR, 0, 0xfffff, 0xbb, 0xc);
    set_gdt(FREE_SELECTOR + 8, 0, 0xfffff, 0x33, 0xc);
    set_gate(0x70, trap_stubs + 16 * 0x70, 0xee, 0);
    *gate_of(0x70) = (*gate_of(0x70) & ~0xffff0000ull) | (FREE_SELECTOR | 1) << 16;
    static const struct {
        const char *name;
        u32 ss1, vector, error;
    } bad[] = {
        {"a null stack segment in the TSS", 0, TS, 0},
        {"code as a stack segment", KERNEL_CODE | 1, TS, KERNEL_CODE},
        {"a stack segment with the wrong RPL", KERNEL_DATA, TS, KERNEL_DATA},
        {"a stack segment with the wrong DPL", KERNEL_DATA | 1, TS, KERNEL_DATA},
        {"a stack segment behind the table", 0x209, TS, 0x208},
        {"a stack segment that is not present", (FREE_SELECTOR + 8) | 1, SS, FREE_SELECTOR + 8},
    };
    for (u32 i = 0; i < ARRAY_SIZE(bad); i++) {
        tss.ss1 = bad[i].ss1;
        tss.sp1 = (reg)arena + 4096;
        run_user(int70, 0);
        check_trap(bad[i].name, bad[i].vector, bad[i].error, (reg)int70_at);
    }
    set_gate(0x70, trap_stubs + 16 * 0x70, 0x8e, 0);

    handlers[0x70] = 0;
}

static void call_gates(void) {
    /* Called by CPL 3 with two words, it adds them in ESI and returns over them. */
    extern char gate_target[];
    asm(".pushsection .text.probes, \"ax\"\n"
        "gate_target: mov 8(%esp), %esi\n add 12(%esp), %esi\n mov %esp, %edi\n mov %ss, %ebx\n lret $8\n"
        ".popsection");
    reg to = (reg)gate_target;
    gdt[FREE_SELECTOR >> 3] = (to & 0xffff) | KERNEL_CODE << 16 | 2ull << 32 | 0xecull << 40 | (u64)(to >> 16) << 48;
    extern volatile u32 gate_result[4];
    USER_PROBE(through_gate, "push $40; push $2; mov %esp, %ebp",
               "lcall $0x90, $0; sub %esp, %ebp; mov %esi, gate_result; mov %edi, gate_result+4; mov %ebx, gate_result+8; "
               "mov %ebp, gate_result+12");
    run_user(through_gate, 0);
    check_trap("a call gate from CPL 3 returns", USER_END, 0, 0);
    check("its words were copied", gate_result[0], 42);
    check("it ran on the TSS's stack, with six words", gate_result[1], tss.sp0 - 24);
    check("and its segment", gate_result[2], KERNEL_DATA);
    check("LRET 8 released the words of both stacks", gate_result[3], (u32)-8);
    gdt[FREE_SELECTOR >> 3] &= ~(0x60ull << 40);
    USER_TRAPS(gate_denied, "a call gate of DPL 0 from CPL 3", "", "lcall $0x90, $0", GP, 0x90);
    gdt[FREE_SELECTOR >> 3] = (gdt[FREE_SELECTOR >> 3] | 0x60ull << 40) & ~(0x80ull << 40);
    USER_TRAPS(gate_absent, "a call gate that is not present", "", "lcall $0x90, $0", NP, 0x90);
}
volatile u32 gate_result[4];

static void double_faults(void) {
    u64 gate = *gate_of(GP);
    *gate_of(GP) &= ~(0x80ull << 40);
    TRAPS(gp_np, "#GP whose gate is not present", "mov $0x208, %eax", "mov %eax, %ds", DF, 0);
    *gate_of(GP) = gate;
    gate = *gate_of(UD);
    *gate_of(UD) &= ~(0x80ull << 40);
    TRAPS(ud_np, "#UD whose gate is not present", "", "ud2", NP, UD * 8 + 3);
    *gate_of(UD) = gate;
}

void bare_main(void) {
    asm volatile("sidt %0" : "=m"(idt_register));
    only_32_bits();
    limits();
    looking_up();
    stack_switches();
    call_gates();
    double_faults();
}
