/* Exceptions in 64-bit mode (SDM 3A, chapter 6): vectors, error codes, stacks, interrupt shadows, alignment. */
#include "common/apic.h"
#include "common/capture.h"

enum { TF = 1 << 8, IF = 1 << 9, NT = 1 << 14, RF = 1 << 16, AC_FLAG = 1 << 18, IOPL3 = 3 << 12 };
enum { MF = 16, XM = 19, PRESENT_INTERRUPT = 0x8e, PRESENT_TRAP = 0x8f };

static void default_gate(int vector) { set_gate(vector, trap_stubs + 16 * vector, PRESENT_INTERRUPT, 0); }

/* ---- one instruction, one exception */

static void arithmetic(void) {
    TRAPS(divide_zero, "DIV by 0", "xor %ecx, %ecx; xor %edx, %edx; mov $1, %eax", "div %ecx", DE, 0);
    TRAPS(divide_large, "DIV overflow", "mov $1, %ecx; mov $1, %edx; mov $1, %eax", "div %ecx", DE, 0);
    TRAPS(idiv_minimum, "IDIV of the smallest by -1", "mov $-1, %ecx; mov $0x80000000, %eax; cltd", "idiv %ecx", DE, 0);
    TRAPS(idiv64, "IDIV of 64 bits", "mov $-1, %rcx; mov $1, %eax; shl $63, %rax; cqto", "idiv %rcx", DE, 0);
    USER_TRAPS(divide_user, "DIV by 0 at CPL 3", "xor %ecx, %ecx", "div %cl", DE, 0);
    TRAPS(divide_fine, "DIV of the largest that fits", "mov $2, %ecx; mov $1, %edx; mov $-1, %eax", "div %ecx", NO_TRAP, 0);
}

static void invalid_opcodes(void) {
    TRAPS(ud2, "UD2", "", "ud2", UD, 0);
    TRAPS(ud1, "UD1", "", ".byte 0x0f, 0xb9, 0xc0", UD, 0);
    TRAPS(ud0, "UD0", "", ".byte 0x0f, 0xff, 0xc0", UD, 0);
    TRAPS(push_es, "PUSH ES in 64-bit mode", "", ".byte 0x06", UD, 0);
    TRAPS(daa, "DAA in 64-bit mode", "", ".byte 0x27", UD, 0);
    TRAPS(into, "INTO in 64-bit mode", "", ".byte 0xce", UD, 0);
    TRAPS(pusha, "PUSHA in 64-bit mode", "", ".byte 0x60", UD, 0);
    TRAPS(far_call, "CALL with an immediate far pointer in 64-bit mode", "", ".byte 0x9a, 0, 0, 0, 0, 8, 0", UD, 0);
    TRAPS(group_82, "opcode 82 in 64-bit mode", "", ".byte 0x82, 0xc0, 0", UD, 0);
    TRAPS(lock_register, "LOCK with a register", "", ".byte 0xf0, 0x01, 0xc0", UD, 0);
    TRAPS(lock_mov, "LOCK MOV", "", ".byte 0xf0, 0x89, 0x07", UD, 0);
    TRAPS(lock_cmp, "LOCK CMP", "", ".byte 0xf0, 0x39, 0x07", UD, 0);
    TRAPS(lock_bt, "LOCK BT", "", ".byte 0xf0, 0x0f, 0xa3, 0x07", UD, 0);
    TRAPS(lea_register, "LEA of a register", "", ".byte 0x8d, 0xc0", UD, 0);
    TRAPS(mov_cs, "MOV to CS", "", ".byte 0x8e, 0xc8", UD, 0);
    TRAPS(mov_segment_6, "MOV from segment register 6", "", ".byte 0x8c, 0xf0", UD, 0);
    TRAPS(mov_cr1, "MOV from CR1", "", ".byte 0x0f, 0x20, 0xc8", UD, 0);
    TRAPS(long_one, "an instruction of 16 bytes", "",
          ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90", GP, 0);
    TRAPS(just_right, "an instruction of 15 bytes", "",
          ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90", NO_TRAP, 0);
    USER_TRAPS(ud2_user, "UD2 at CPL 3", "", "ud2", UD, 0);
}

static void floating_point(void) {
    reg cr0 = get_cr0();
    set_cr0(cr0 | 8);
    TRAPS(ts_x87, "x87 with CR0.TS", "", "fld1", NM, 0);
    TRAPS(ts_wait, "FWAIT with CR0.TS and CR0.MP", "", "fwait", NM, 0);
    TRAPS(ts_sse, "SSE with CR0.TS", "", "xorps %xmm0, %xmm0", NM, 0);
    set_cr0((cr0 | 8) & ~2ul);
    TRAPS(ts_wait_alone, "FWAIT with CR0.TS alone", "", "fwait", NO_TRAP, 0);
    TRAPS(clts, "CLTS", "", "clts", NO_TRAP, 0);
    check("CLTS clears CR0.TS", get_cr0() & 8, 0);
    set_cr0(cr0 | 4);
    TRAPS(em_x87, "x87 with CR0.EM", "", "fld1", NM, 0);
    TRAPS(em_sse, "SSE with CR0.EM", "", "xorps %xmm0, %xmm0", UD, 0);
    set_cr0(cr0);
    reg cr4 = get_cr4();
    set_cr4(cr4 & ~(1ul << 9));
    TRAPS(no_osfxsr, "SSE without CR4.OSFXSR", "", "xorps %xmm0, %xmm0", UD, 0);
    set_cr4(cr4);
    TRAPS(x87_wait, "x87 division by zero waits for the next instruction",
          "fninit; push $0x37b; fldcw (%rsp); pop %rax; fldz; fld1; fdivp", "fwait", MF, 0);
    asm volatile("fnclex; fninit");
    TRAPS(sse_divide, "SSE division by zero",
          "push $0x1d80; ldmxcsr (%rsp); pop %rax; xorps %xmm1, %xmm1; mov $1, %eax; cvtsi2ss %eax, %xmm0",
          "divss %xmm1, %xmm0", XM, 0);
    set_cr4(cr4 & ~(1ul << 10));
    TRAPS(sse_no_xm, "SSE division by zero without CR4.OSXMMEXCPT", "", "divss %xmm1, %xmm0", UD, 0);
    set_cr4(cr4);
    asm volatile("push $0x1f80; ldmxcsr (%%rsp); pop %%rax" ::: "rax");
    TRAPS(movaps_odd, "MOVAPS that is not aligned", "lea -24(%rsp), %rdi; and $-16, %rdi", "movaps 8(%rdi), %xmm0", GP, 0);
    if (cpu_has(1, 0, 2, 13))
        TRAPS(cmpxchg16b_odd, "CMPXCHG16B that is not aligned", "lea -48(%rsp), %rdi; and $-16, %rdi", "cmpxchg16b 8(%rdi)",
              GP, 0);
}

static void privileges(void) {
    USER_TRAPS(hlt_user, "HLT at CPL 3", "", "hlt", GP, 0);
    USER_TRAPS(cli_user, "CLI at CPL 3", "", "cli", GP, 0);
    USER_TRAPS(in_user, "IN at CPL 3", "", "inb $0x80, %al", GP, 0);
    USER_TRAPS(cr0_user, "MOV from CR0 at CPL 3", "", "mov %cr0, %rax", GP, 0);
    USER_TRAPS(dr7_user, "MOV from DR7 at CPL 3", "", "mov %dr7, %rax", GP, 0);
    USER_TRAPS(rdmsr_user, "RDMSR at CPL 3", "mov $0x10, %ecx", "rdmsr", GP, 0);
    USER_TRAPS(lgdt_user, "LGDT at CPL 3", "", "lgdt gdt_pointer(%rip)", GP, 0);
    USER_TRAPS(ltr_user, "LTR at CPL 3", "", "ltr %ax", GP, 0);
    USER_TRAPS(wbinvd_user, "WBINVD at CPL 3", "", "wbinvd", GP, 0);
    USER_TRAPS(swapgs_user, "SWAPGS at CPL 3", "", "swapgs", GP, 0);
    USER_TRAPS(sysret_user, "SYSRET at CPL 3", "", "sysretq", GP, 0);
    USER_TRAPS(clts_user, "CLTS at CPL 3", "", "clts", GP, 0);
    USER_TRAPS(rdpmc_user, "RDPMC at CPL 3 without CR4.PCE", "xor %ecx, %ecx", "rdpmc", GP, 0);
    USER_TRAPS(int_user, "INT through a gate of DPL 0", "", "int $0x70", GP, 0x70 * 8 + 2);
    USER_TRAPS(int3_user, "INT3 through a gate of DPL 0", "", "int3", GP, BP * 8 + 2);
    TRAPS(bad_msr_read, "RDMSR of an MSR that is not there", "mov $0x12345678, %ecx", "rdmsr", GP, 0);
    TRAPS(bad_msr_write, "WRMSR of an MSR that is not there", "mov $0x12345678, %ecx", "wrmsr", GP, 0);
    TRAPS(efer_reserved, "WRMSR of a reserved bit of EFER", "mov $0xc0000080, %ecx; rdmsr; or $0x200, %eax", "wrmsr", GP, 0);
    TRAPS_OR_ENDS(efer_lme, "clearing EFER.LME with paging on", "mov $0xc0000080, %ecx; rdmsr; and $~0x100, %eax", "wrmsr", GP, 0);
    TRAPS(lstar_odd, "WRMSR of LSTAR that is not canonical", "mov $0xc0000082, %ecx; xor %eax, %eax; mov $0x8000, %edx", "wrmsr",
          GP, 0);
    TRAPS(pat_reserved, "WRMSR of a memory type that is not there", "mov $0x277, %ecx; mov $2, %eax; xor %edx, %edx", "wrmsr",
          GP, 0);
    TRAPS_OR_ENDS(cr0_pg, "CR0.PG without CR0.PE", "mov %cr0, %rax; and $~1, %eax", "mov %rax, %cr0", GP, 0);
    TRAPS(cr0_nw, "CR0.NW without CR0.CD", "mov %cr0, %rax; or $0x20000000, %eax", "mov %rax, %cr0", GP, 0);
    TRAPS(cr0_high, "CR0 bit 32", "mov %cr0, %rax; bts $32, %rax", "mov %rax, %cr0", GP, 0);
    TRAPS_OR_ENDS(cr4_pae, "clearing CR4.PAE in long mode", "mov %cr4, %rax; and $~0x20, %rax", "mov %rax, %cr4", GP, 0);
    TRAPS_OR_ENDS(cr4_reserved, "CR4 bit 63", "mov %cr4, %rax; bts $63, %rax", "mov %rax, %cr4", GP, 0);
    TRAPS(cr8_large, "CR8 above 15", "mov $16, %eax", "mov %rax, %cr8", GP, 0);
    set_cr4(get_cr4() | 4);
    USER_TRAPS(rdtsc_user, "RDTSC at CPL 3 with CR4.TSD", "", "rdtsc", GP, 0);
    set_cr4(get_cr4() & ~4ul);
    USER_TRAPS(rdtsc_allowed, "RDTSC at CPL 3", "", "rdtsc", USER_END, 0);
    if (cpu_has(7, 0, 2, 2)) {
        set_cr4(get_cr4() | 1 << 11);
        USER_TRAPS(sgdt_user, "SGDT at CPL 3 with CR4.UMIP", "", "sgdt -16(%rsp)", GP, 0);
        USER_TRAPS(sidt_user, "SIDT at CPL 3 with CR4.UMIP", "", "sidt -16(%rsp)", GP, 0);
        USER_TRAPS(sldt_user, "SLDT at CPL 3 with CR4.UMIP", "", "sldt %ax", GP, 0);
        USER_TRAPS(str_user, "STR at CPL 3 with CR4.UMIP", "", "str %ax", GP, 0);
        USER_TRAPS(smsw_user, "SMSW at CPL 3 with CR4.UMIP", "", "smsw %ax", GP, 0);
        set_cr4(get_cr4() & ~(1ul << 11));
    } else
        skip("UMIP", "not in CPUID");
    USER_TRAPS(smsw_allowed, "SMSW at CPL 3", "", "smsw %ax", USER_END, 0);
    USER_TRAPS(popf_user, "POPF at CPL 3 keeps IF and IOPL", "push $0x3202", "popf", USER_END, 0);
    check("IF and IOPL after it", last.flags & (IF | IOPL3), 0);
    user_flags = 2 | IOPL3;
    USER_TRAPS(iopl_cli, "CLI with IOPL 3", "", "cli", USER_END, 0);
    USER_TRAPS(iopl_in, "IN with IOPL 3", "", "inb $0x80, %al", USER_END, 0);
    user_flags = 2;
}

static void io_permissions(void) {
    static struct {
        struct tss tss;
        u8 map[33];
    } __attribute__((packed, aligned(16))) wide;
    memcpy(&wide.tss, &tss, sizeof(tss));
    memset(wide.map, 0xff, sizeof(wide.map));
    wide.tss.io_map = sizeof(tss);
    wide.map[0x80 / 8] = 0xfa; /* ports 0x80 and 0x82 */
    wide.map[0x90 / 8] = 0;
    wide.map[0xf8 / 8] = 0;
    set_gdt(TASK, (reg)&wide, sizeof(tss) + sizeof(wide.map) - 1, 0x89, 0);
    asm volatile("ltr %w0" ::"r"(TASK));
    USER_TRAPS(map_80, "a port that the bitmap allows", "", "inb $0x80, %al", USER_END, 0);
    USER_TRAPS(map_81, "a port that it denies", "", "inb $0x81, %al", GP, 0);
    USER_TRAPS(map_80_word, "a word over an allowed and a denied port", "", "inw $0x80, %ax", GP, 0);
    USER_TRAPS(map_90_long, "four allowed ports", "", "inl $0x90, %eax", USER_END, 0);
    USER_TRAPS(map_ff, "the last port of the bitmap", "", "inb $0xff, %al", USER_END, 0);
    USER_TRAPS(map_outside, "a port behind the segment's limit", "mov $0x108, %edx", "inb %dx, %al", GP, 0);
    set_gdt(TASK, (reg)&tss, sizeof(tss) - 1, 0x89, 0);
    asm volatile("ltr %w0" ::"r"(TASK));
}

/* ---- segments and gates */

static void segments(void) {
    TRAPS(ds_limit, "DS behind the table", "mov $0x208, %eax", "mov %eax, %ds", GP, 0x208);
    asm volatile("lldt %w0" ::"r"(0));
    TRAPS(ds_ldt, "DS from a table that is not there", "mov $0x14, %eax", "mov %eax, %ds", GP, 0x14);
    TRAPS(ds_task, "DS from a system descriptor", "mov $0x38, %eax", "mov %eax, %ds", GP, 0x38);
    TRAPS(ss_null, "a null SS is fine at CPL 0", "xor %eax, %eax", "mov %eax, %ss", NO_TRAP, 0);
    asm volatile("mov %0, %%ss" ::"r"(KERNEL_DATA));
    TRAPS(ss_code, "SS from a code segment", "mov $0x08, %eax", "mov %eax, %ss", GP, 0x08);
    TRAPS(ss_rpl, "SS with the wrong RPL", "mov $0x13, %eax", "mov %eax, %ss", GP, 0x10);
    USER_TRAPS(ss_null_user, "a null SS at CPL 3", "mov $3, %eax", "mov %eax, %ss", GP, 0);
    USER_TRAPS(ds_kernel, "a kernel's DS at CPL 3", "mov $0x10, %eax", "mov %eax, %ds", GP, 0x10);
    USER_TRAPS(ds_null, "a null DS at CPL 3", "xor %eax, %eax", "mov %eax, %ds", USER_END, 0);
    set_gdt(FREE_SELECTOR, 0, 0xfffff, 0x13, 0xc);
    TRAPS(ds_absent, "a DS that is not present", "mov $0x90, %eax", "mov %eax, %ds", NP, 0x90);
    TRAPS(ss_absent, "an SS that is not present", "mov $0x90, %eax", "mov %eax, %ss", SS, 0x90);
    set_gdt(FREE_SELECTOR, 0, 0xfffff, 0x98, 0xa);
    TRAPS(ds_unreadable, "DS from code that cannot be read", "mov $0x90, %eax", "mov %eax, %ds", GP, 0x90);
    set_gdt(FREE_SELECTOR, 0, 0xfffff, 0x92, 0xc);
    TRAPS(ds_accessed, "DS from a fresh descriptor", "mov $0x90, %eax", "mov %eax, %ds", NO_TRAP, 0);
    check("its accessed bit is set", gdt[FREE_SELECTOR >> 3] >> 40 & 0xff, 0x93);
    TRAPS(ltr_data, "LTR of a data segment", "mov $0x10, %eax", "ltr %ax", GP, 0x10);
    TRAPS(ltr_busy, "LTR of the present task", "mov $0x38, %eax", "ltr %ax", GP, 0x38);
    TRAPS(lldt_data, "LLDT of a data segment", "mov $0x10, %eax", "lldt %ax", GP, 0x10);
    TRAPS(iret_data, "IRET to a data segment", "mov %rsp, %rax; push $0x10; push %rax; push $2; push $0x10; push $0", "iretq",
          GP, 0x10);
    TRAPS_OR_ENDS(iret_rpl, "IRET to a CS with the wrong RPL", "mov %rsp, %rax; push $0x10; push %rax; push $2; push $0xb; push $0",
          "iretq", GP, 0x08);
    TRAPS(far_return, "a far return behind the table", "push $0x208; push $0", "lretq", GP, 0x208);
    asm volatile("mov %0, %%ds; mov %0, %%es" ::"r"(KERNEL_DATA));
    TRAPS(fs_null, "FS takes a null selector", "xor %eax, %eax", "mov %eax, %fs", NO_TRAP, 0);
}

static void gates(void) {
    const void *entry = trap_stubs + 16 * 0x70;
    set_gate(0x70, entry, 0x0e, 0);
    TRAPS(int_absent, "INT through a gate that is not present", "", "int $0x70", NP, 0x70 * 8 + 2);
    set_gate(0x70, entry, 0x8c, 0);
    TRAPS(int_call_gate, "INT through a call gate", "", "int $0x70", GP, 0x70 * 8 + 2);
    set_gate(0x70, entry, 0x85, 0);
    TRAPS(int_task_gate, "INT through a task gate", "", "int $0x70", GP, 0x70 * 8 + 2);
    default_gate(0x70);
    set_gate(UD, trap_stubs + 16 * UD, 0x0e, 0);
    TRAPS(ud_absent, "an exception through a gate that is not present is external", "", "ud2", NP, UD * 8 + 3);
    default_gate(UD);
    struct {
        u16 limit;
        reg base;
    } __attribute__((packed)) table;
    asm volatile("sidt %0" : "=m"(table));
    table.limit = 0x70 * 16 + 14;
    asm volatile("lidt %0" ::"m"(table));
    TRAPS(int_limit, "INT behind the table's limit", "", "int $0x70", GP, 0x70 * 8 + 2);
    load_tables();
    /* A gate's code segment: bits 16 to 31 of its first half. */
    u64 *gate = (u64 *)table.base + 0x70 * 2, whole = *gate;
    *gate = whole & ~0xffff0000ull;
    TRAPS(gate_null, "a gate to a null segment", "", "int $0x70", GP, 0);
    *gate = (whole & ~0xffff0000ull) | KERNEL_DATA << 16;
    TRAPS(gate_data, "a gate to a data segment", "", "int $0x70", GP, KERNEL_DATA);
    *gate = (whole & ~0xffff0000ull) | KERNEL_CODE32 << 16;
    TRAPS(gate_32, "a gate to a 32-bit segment", "", "int $0x70", GP, KERNEL_CODE32);
    *gate = (whole & ~0xffff0000ull) | (USER_CODE & ~3) << 16;
    TRAPS(gate_outer, "a gate to an outer segment", "", "int $0x70", GP, USER_CODE & ~3);
    set_gdt(FREE_SELECTOR, 0, 0xfffff, 0x1b, 0xa);
    *gate = (whole & ~0xffff0000ull) | FREE_SELECTOR << 16;
    TRAPS(gate_segment_absent, "a gate to a segment that is not present", "", "int $0x70", NP, FREE_SELECTOR);
    *gate = whole;
    gate[1] = 0x8000;
    TRAPS(gate_canonical, "a gate to an address that is not canonical", "", "int $0x70", GP, 0);
    default_gate(0x70);
}

static void double_faults(void) {
    PROBE(raise_de, "xor %ecx, %ecx", "div %ecx");
    PROBE(raise_pf, "mov $1, %eax; shl $46, %rax", "mov (%rax), %al");
    PROBE(raise_ud, "", "ud2");
    set_gate(GP, trap_stubs + 16 * GP, 0x0e, 0);
    TRAPS(gp_then_np, "#GP whose gate is not present", "mov $0x208, %eax", "mov %eax, %ds", DF, 0);
    set_gate(DE, trap_stubs + 16 * DE, 0x0e, 0);
    run_kernel(raise_de, 0);
    check_trap("#DE whose gate is not present", DF, 0, (reg)raise_de_at);
    default_gate(DE);
    set_gate(PF, trap_stubs + 16 * PF, 0x0e, 0);
    run_kernel(raise_pf, 0);
    check_trap("#PF whose gate is not present", DF, 0, (reg)raise_pf_at);
    default_gate(PF);
    default_gate(GP);
    set_gate(UD, trap_stubs + 16 * UD, 0x0e, 0);
    run_kernel(raise_ud, 0);
    check_trap("#UD is benign: #NP follows", NP, UD * 8 + 3, (reg)raise_ud_at);
    default_gate(UD);
    reg sp0 = tss.sp0;
    tss.sp0 = 1ul << 46;
    USER_TRAPS(stack_gone, "#UD onto an absent stack: #PF, #PF again, #DF", "", "ud2", DF, 0);
    check("CR2 is the stack's", last.cr2 >> 4, ((1ul << 46) - 8) >> 4);
    tss.sp0 = 1ul << 47;
    USER_TRAPS(stack_odd, "#UD onto a stack that is not canonical: #SS, #SS again, #DF", "", "ud2", DF, 0);
    tss.sp0 = sp0;
}

static void stacks_and_flags(void) {
    static u8 other_stack[4096] __attribute__((aligned(16)));
    PROBE(int70, "", "int $0x70");
    PROBE(int70_odd, "mov %rsp, %rdi; and $-16, %rsp; sub $5, %rsp", "int $0x70; mov %rdi, %rsp");
    PROBE(int70_flags, "mov %rdi, %rax; push %rax; popf", "int $0x70; push $2; popf");
    PROBE(raise_ud2, "push $0x40202; popf", "ud2; push $2; popf");
    USER_PROBE(int70_user, "", "int $0x70");
    handlers[0x70] = handlers[UD] = capture;
    seen_count = 0;
    run_kernel(int70, 0);
    check("INT returns", seen_count, 1);
    check("INT's RIP is the next instruction's", seen.ip, (reg)int70_next);
    check("INT stays on its stack", seen_end - 16 <= recovery_stack && seen_end + 16 > recovery_stack - 64, 1);
    check("the frame is aligned", seen_end & 15, 0);
    run_kernel(int70_odd, 0);
    check("an odd stack is aligned", seen_end & 15, 0);
    check("below where it was", seen.sp - seen_end <= 15 && (seen.sp & 15) == 11, 1);
    tss.ist[1] = (reg)(other_stack + sizeof(other_stack));
    set_gate(0x70, trap_stubs + 16 * 0x70, 0xee, 2);
    run_kernel(int70, 0);
    check("IST 2", seen_end, tss.ist[1]);
    tss.ist[1] -= 8;
    run_kernel(int70, 0);
    check("IST is aligned", seen_end, (reg)(other_stack + sizeof(other_stack) - 16));
    check("IST at CPL 0 keeps SS", seen_ss, KERNEL_DATA);
    run_user(int70_user, 0);
    check("IST from CPL 3", seen_end, (reg)(other_stack + sizeof(other_stack) - 16));
    check("from CPL 3 SS becomes null", seen_ss, 0);
    check("the frame has CPL 3's SS", seen.ss, USER_DATA);
    check("and its CS", seen.cs, USER_CODE);
    set_gate(0x70, trap_stubs + 16 * 0x70, 0xee, 0);
    tss.sp0 -= 8;
    run_user(int70_user, 0);
    check("RSP0 is aligned", seen_end, (reg)(kernel_stack + sizeof(kernel_stack) - 16));
    tss.sp0 += 8;
    set_gate(0x70, trap_stubs + 16 * 0x70, PRESENT_INTERRUPT, 0);
    run_kernel(int70_flags, 2 | IF | NT | AC_FLAG | 0x8d5);
    check("an interrupt gate clears IF, NT and RF", seen_flags & (IF | NT | RF | TF), 0);
    check("and keeps AC", seen_flags & AC_FLAG, AC_FLAG);
    check("the frame keeps all flags", seen.flags, 2 | IF | NT | AC_FLAG | 0x8d5);
    set_gate(0x70, trap_stubs + 16 * 0x70, PRESENT_TRAP, 0);
    run_kernel(int70_flags, 2 | IF);
    check("a trap gate keeps IF", seen_flags & IF, IF);
    default_gate(0x70);
    resume_at = (reg)raise_ud2_next - 3;
    run_kernel(raise_ud2, 0);
    check("a fault's frame has RF", seen.flags & RF, RF);
    handlers[0x70] = handlers[UD] = 0;
    interrupts_off();
    set_flags(2);
}

/* ---- interrupt shadows and alignment */

static void interrupt_shadows(void) {
    extern char sti_nop_a[], popf_a[];
    PROBE(sti_nop, "", "sti\n nop\n sti_nop_a: nop\n cli");
    PROBE(sti_cli, "", "sti\n cli");
    PROBE(popf_if, "push $0x202", "popf\n popf_a: nop\n cli");
    apic_on();
    handlers[0x50] = capture;
    seen_count = 0;
    apic_write(APIC_ICR, ICR_SELF | ICR_ASSERT | 0x50);
    run_kernel(sti_cli, 0);
    check("STI, CLI leaves no gap", seen_count, 0);
    run_kernel(sti_nop, 0);
    check("the interrupt comes one instruction behind STI", seen_count == 1 ? seen.ip : seen_count, (reg)sti_nop_a);
    check("an interrupt's frame has no RF", seen.flags & RF, 0);
    apic_eoi();
    apic_write(APIC_ICR, ICR_SELF | ICR_ASSERT | 0x50);
    run_kernel(popf_if, 0);
    check("POPF has no shadow", seen_count == 2 ? seen.ip : seen_count, (reg)popf_a);
    apic_eoi();
    apic_write(APIC_ICR, ICR_SELF | ICR_ASSERT | 0x50);
    wait_interrupt();
    check("STI, HLT wakes up", seen_count, 3);
    apic_eoi();
    handlers[0x50] = 0;
}

u8 operand[16] __attribute__((aligned(16)));

static void alignment(void) {
    USER_PROBE(odd_read, "", "movl operand+1(%rip), %eax");
    USER_PROBE(even_read, "", "movl operand+4(%rip), %eax");
    USER_PROBE(odd_byte, "", "movb operand+1(%rip), %al");
    USER_PROBE(odd_write, "", "movw %ax, operand+3(%rip)");
    PROBE(odd_kernel, "push $0x40002; popf", "movl operand+1(%rip), %eax; push $2; popf");
    set_cr0(get_cr0() | 1 << 18);
    run_user(odd_read, 0);
    check_trap("CR0.AM without the AC flag", USER_END, 0, 0);
    user_flags = 2 | AC_FLAG;
    run_user(odd_read, 0);
    check_trap("a read that is not aligned", AC, 0, USER(odd_read_at));
    run_user(odd_write, 0);
    check_trap("a write that is not aligned", AC, 0, USER(odd_write_at));
    run_user(even_read, 0);
    check_trap("an aligned read", USER_END, 0, 0);
    run_user(odd_byte, 0);
    check_trap("a byte is always aligned", USER_END, 0, 0);
    run_kernel(odd_kernel, 0);
    check_trap("CPL 0 is not checked", NO_TRAP, 0, 0);
    set_cr0(get_cr0() & ~(1ul << 18));
    run_user(odd_read, 0);
    check_trap("the AC flag without CR0.AM", USER_END, 0, 0);
    user_flags = 2;
}

void bare_main(void) {
    arithmetic();
    invalid_opcodes();
    floating_point();
    privileges();
    io_permissions();
    segments();
    gates();
    double_faults();
    stacks_and_flags();
    interrupt_shadows();
    alignment();
}
