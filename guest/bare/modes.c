/* Changes of mode: real, protected, compatibility and 64-bit mode and back (SDM 3A 9.8 and 9.9), fast system calls, far
 * transfers, FS and GS bases. */
#include "common/bare.h"

enum { EFER = 0xc0000080, STAR, LSTAR, CSTAR, FMASK, FS_BASE = 0xc0000100, GS_BASE, KERNEL_GS_BASE };
enum { SYSENTER_CS = 0x174, SYSENTER_ESP, SYSENTER_EIP };
enum { IF = 1 << 9, TF = 1 << 8, CF = 1, CR4_FSGSBASE = 1 << 16 };

static int is_intel(void) {
    u32 r[4];
    cpuid(0, 0, r);
    return r[1] == 0x756e6547;
}

/* ---- long mode -> compatibility -> protected -> 16-bit protected -> real -> protected -> long
 *
 * `journey` is called in 64-bit mode. It lives in one page that is copied below 1 MiB, at STATION, and leaves what it saw
 * in the words at its end. */
#define STATION 0x8000
asm(".pushsection .text.probes, \"ax\"\n"
    ".globl journey, journey_end, journey_notes\n"
    "journey:\n"
    "    push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    "    mov %rsp, STATION + saved - journey\n"
    "    push $0x18; push $STATION + compatible - journey; lretq\n"
    "    .code32\n"
    "compatible:\n"
    "    mov $0x10, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss\n"
    "    mov $STATION + stack - journey, %esp\n"
    "    xor %eax, %eax; .byte 0x40; mov %eax, STATION + note_compatible - journey\n" /* INC EAX here, REX in 64-bit mode */
    "    mov %cr0, %eax; and $0x7fffffff, %eax; mov %eax, %cr0\n"
    "    mov $0xc0000080, %ecx; rdmsr; mov %eax, STATION + note_efer - journey\n"
    "    and $~0x100, %eax; wrmsr\n"
    "    mov %cr4, %eax; mov %eax, STATION + note_cr4 - journey; and $~0x20, %eax; mov %eax, %cr4\n"
    "    sidt STATION + old_idt - journey; lidt STATION + real_idt - journey\n"
    "    ljmp $0x48, $STATION + sixteen - journey\n"
    "    .code16\n"
    "sixteen:\n"
    "    mov $0x50, %ax; mov %ax, %ds; mov %ax, %es; mov %ax, %ss; mov %ax, %fs; mov %ax, %gs\n"
    "    mov $0x1234, %ax; push %ax; pop %bx; mov %bx, STATION + note_sixteen - journey\n"
    "    mov %cr0, %eax; and $~1, %eax; mov %eax, %cr0\n"
    "    ljmp $STATION >> 4, $real - journey\n" /* CS base changes with the selector only here */
    "real:\n"
    "    mov %cs, %ax; mov %ax, %ds; mov %ax, %ss; mov $stack - journey, %sp\n"
    "    mov $0x900, %ax; mov %ax, %es; movl $0x600d600d, %es:0x10\n" /* physical 0x9010 */
    "    xor %ax, %ax; mov %ax, %fs; mov %fs:0x9010, %eax; mov %eax, note_segments - journey\n"
    "    movw $handler - journey, %fs:0x70 * 4; movw $STATION >> 4, %fs:0x70 * 4 + 2\n"
    "    xor %bx, %bx; stc; sti; int $0x70; pushf; pop %ax; cli\n"
    "    mov %bx, note_interrupt - journey; mov %ax, note_flags - journey\n"
    "    mov $0xffff, %ax; mov %ax, %es; movb $0x77, %es:over_1_mib - 0xffff0\n" /* A20 is open */
    "    lcall $STATION >> 4, $far - journey; mov %cx, note_far - journey\n"
    "    xor %ax, %ax; mov $0x10000, %ebx; dec %bx; lea 1(%bx), %edx; mov %edx, note_wrap - journey\n"
    "    mov %cr0, %eax; or $1, %eax; mov %eax, %cr0\n"
    "    ljmpl $0x18, $STATION + protected - journey\n"
    "handler: mov $0x7070, %bx; mov %sp, %bp; andw $~1, 4(%bp); iret\n" /* clears the carry flag that IRET restores */
    "far:     mov $0xfa, %cx; lret\n"
    "    .code32\n"
    "protected:\n"
    "    mov $0x10, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss\n"
    "    lidt STATION + old_idt - journey\n"
    "    mov %cr4, %eax; or $0x20, %eax; mov %eax, %cr4\n"
    "    mov $0xc0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr; rdmsr; mov %eax, STATION + note_lme - journey\n"
    "    mov %cr0, %eax; or $0x80000000, %eax; mov %eax, %cr0\n"
    "    rdmsr; mov %eax, STATION + note_lma - journey\n"
    "    ljmp $0x08, $STATION + long_again - journey\n"
    "    .code64\n"
    "long_again:\n"
    "    mov STATION + saved - journey, %rsp; lidt idt_pointer\n"
    "    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n"
    "    .balign 8\n"
    "saved: .quad 0\n"
    "old_idt: .skip 8\n"
    "real_idt: .word 0x3ff; .long 0; .word 0\n"
    "journey_notes:\n"
    "note_compatible: .long 0\n note_efer: .long 0\n note_cr4: .long 0\n note_sixteen: .long 0\n note_segments: .long 0\n"
    "note_interrupt: .long 0\n note_flags: .long 0\n note_far: .long 0\n note_wrap: .long 0\n note_lme: .long 0\n"
    "note_lma: .long 0\n"
    "    .skip 256\n"
    "stack:\n"
    "journey_end:\n"
    ".globl over_1_mib\nover_1_mib: .byte 0\n"
    ".popsection\n"
    ".set STATION, 0x8000");
extern char journey[], journey_end[], journey_notes[];
extern volatile u8 over_1_mib;
struct notes {
    u32 compatible, efer, cr4, sixteen, segments, interrupt, flags, far, wrap, lme, lma;
};

static void round_trip(void) {
    u32 idt_before[3], idt_after[3];
    for (int trip = 0; trip < 2; trip++) {
        memcpy((void *)STATION, journey, journey_end - journey);
        over_1_mib = 0;
        asm volatile("sidt %0" : "=m"(idt_before));
        ((void (*)(void))STATION)();
        asm volatile("sidt %0" : "=m"(idt_after));
    }
    volatile struct notes *notes = (void *)(STATION + (journey_notes - journey));
    check("compatibility mode decodes as 32-bit code", notes->compatible, 1);
    check("without paging EFER.LMA is clear, LME is not", notes->efer & 0x500, 0x100);
    check("CR4 is what it was", notes->cr4, get_cr4());
    check("16-bit protected mode pushes words", notes->sixteen, 0x1234);
    check("real-mode segments count paragraphs", notes->segments, 0x600d600d);
    check("INT goes through the vector table", notes->interrupt, 0x7070);
    check("IRET restores IF and the handler's carry", notes->flags & (IF | CF), IF);
    check("addresses above 1 MiB from segment ffff", over_1_mib, 0x77);
    check("a far call in real mode", notes->far, 0xfa);
    check("16-bit addresses wrap", notes->wrap, 0);
    check("EFER.LME alone", notes->lme & 0x500, 0x100);
    check("EFER.LMA with paging", notes->lma & 0x500, 0x500);
    check("the IDT is back", idt_after[0] == idt_before[0] && idt_after[1] == idt_before[1], 1);
    TRAPS(still_alive, "exceptions arrive after the journey", "", "ud2", UD, 0);
}

/* ---- compatibility mode at CPL 0 and 3 */

static void compatibility(void) {
    extern volatile u64 compat_result[4];
    /* Calls 32-bit code far and comes back far. */
    PROBE(call_32, "mov $0x1234567890, %rax; mov %rax, %rbx; push %rbx",
          "lcall *compat_pointer(%rip)\n mov %rax, compat_result(%rip); mov %rbx, compat_result+8(%rip); pop %rbx");
    asm(".pushsection .text.probes, \"ax\"\n.code32\n"
        "compat_code: xor %eax, %eax; .byte 0x40, 0x40; lea 0xffffffff(%eax), %ebx; lret\n.code64\n.popsection\n"
        ".pushsection .data\ncompat_pointer: .long compat_code; .word 0x18\n.popsection");
    u64 guard_rbx = 0x1234567890;
    run_kernel(call_32, guard_rbx);
    check_trap("a far call to 32-bit code and back", NO_TRAP, 0, 0);
    check("INC, not REX", compat_result[0], 2);
    check("32-bit addresses wrap", compat_result[1], 1);

    extern char user_32[], user_32_at[];
    asm(".pushsection .text.probes, \"ax\"\n.code32\n"
        "user_32: xor %ecx, %ecx; .byte 0x49; pusha; popa; mov $0x2b, %eax; mov %eax, %ds; mov %ecx, %esi\n"
        "user_32_at: int $0x80\n.code64\n.popsection");
    guarded_user(USER(user_32), 0, USER_CODE32, USER(user_stack + 4096));
    check_trap("IRETQ to 32-bit user code", USER_END, 0, USER(user_32_at) + 2);
    check("its CS", last.cs, USER_CODE32);
    check("its ESP", last.sp, USER(user_stack + 4096));
    extern char user_32_into[], user_32_into_next[];
    asm(".pushsection .text.probes, \"ax\"\n.code32\n"
        "user_32_into: aam $0\nuser_32_into_next:\n.code64\n.popsection");
    (void)user_32_into_next;
    guarded_user(USER(user_32_into), 0, USER_CODE32, USER(user_stack + 4096));
    check_trap("AAM 0 in 32-bit user code", DE, 0, USER(user_32_into));
    extern char user_32_syscall[];
    asm(".pushsection .text.probes, \"ax\"\n.code32\nuser_32_syscall: .byte 0x0f, 0x05; int $0x80\n.code64\n.popsection");
    if (is_intel()) {
        /* QEMU goes there instead. */
        PROBE(cstar, "", "ud2");
        wrmsr(CSTAR, (reg)cstar);
        guarded_user(USER(user_32_syscall), 0, USER_CODE32, USER(user_stack + 4096));
        check_trap("SYSCALL in compatibility mode, on Intel", UD, 0, USER(user_32_syscall));
    } else
        skip("SYSCALL in compatibility mode is #UD", "not Intel's");
}
volatile u64 compat_result[4];

/* ---- SYSCALL and SYSRET */

volatile u64 entry_seen[6];
u64 entry_stack;
extern char syscall_entry[], syscall_entry_32[], sysret_32_target[], sysenter_entry[], sysenter_entry_32[];
asm(".pushsection .text.probes, \"ax\"\n"
    "note_entry:\n"
    "    mov %rcx, entry_seen(%rip); mov %r11, entry_seen+8(%rip); mov %cs, %eax; mov %eax, entry_seen+16(%rip)\n"
    "    mov %ss, %eax; mov %eax, entry_seen+24(%rip); mov %rsp, entry_seen+32(%rip)\n"
    "    mov entry_stack(%rip), %rsp; pushf; pop entry_seen+40(%rip)\n"
    "    mov entry_seen+32(%rip), %rsp; jmp *%r8\n"
    "syscall_entry: lea 1f(%rip), %r8; jmp note_entry; 1: sysretq\n"
    "syscall_entry_32: mov $sysret_32_target + 0x80000000, %ecx; sysretl\n"
    "sysenter_entry: lea 1f(%rip), %r8; jmp note_entry; 1: mov %r9, %rdx; mov %r10, %rcx; sysexitq\n"
    "sysenter_entry_32: mov %r10d, %ecx; mov $sysret_32_target + 0x80000000, %edx; sysexitl\n"
    "    .code32\nsysret_32_target: xor %eax, %eax; .byte 0x40; int $0x80\n    .code64\n"
    ".popsection");

static void system_calls(void) {
    entry_stack = (reg)kernel_stack + 2048;
    wrmsr(EFER, rdmsr(EFER) | 1);
    wrmsr(STAR, (u64)USER_CODE32 << 48 | (u64)KERNEL_CODE << 32);
    wrmsr(LSTAR, (reg)syscall_entry);
    wrmsr(FMASK, IF | TF | CF);
    check("STAR reads back", rdmsr(STAR), (u64)USER_CODE32 << 48 | (u64)KERNEL_CODE << 32);
    check("LSTAR reads back", rdmsr(LSTAR), (reg)syscall_entry);
    USER_PROBE(call_system, "stc", "syscall");
    user_flags = 2 | 0xd4;
    run_user(call_system, 0);
    user_flags = 2;
    check_trap("SYSCALL and SYSRET return", USER_END, 0, USER(call_system_next) + 2);
    check("RCX is the next instruction", entry_seen[0], USER(call_system_next));
    check("R11 has the flags", entry_seen[1], 2 | 0xd4 | CF);
    check("CS is the kernel's", entry_seen[2], KERNEL_CODE);
    check("SS is the kernel's", entry_seen[3], KERNEL_DATA);
    check("RSP is still the user's", entry_seen[4], USER(user_stack + sizeof(user_stack) - 64));
    check("FMASK cleared the carry", entry_seen[5] & (CF | IF), 0);
    check("SYSRET's CS", last.cs, USER_CODE);
    check("SYSRET's SS", last.ss, USER_DATA);
    check("SYSRET's flags come from R11", last.flags & 0xd5, 0xd5);
    wrmsr(LSTAR, (reg)syscall_entry_32);
    run_user(call_system, 0);
    check_trap("SYSRET to 32-bit code", USER_END, 0, 0);
    check("its CS", last.cs, USER_CODE32);
    wrmsr(LSTAR, (reg)syscall_entry);
    PROBE(sysret_odd, "mov $1, %ecx; shl $47, %rcx; mov $2, %r11d", "sysretq");
    if (is_intel()) {
        run_kernel(sysret_odd, 0);
        check_trap("SYSRET to an address that is not canonical is a #GP before it", GP, 0, (reg)sysret_odd_at);
        check("at CPL 0, on Intel", last.cs, KERNEL_CODE);
    } else
        skip("SYSRET to an address that is not canonical", "not Intel's");
    wrmsr(EFER, rdmsr(EFER) & ~1ull);
    run_user(call_system, 0);
    check_trap("SYSCALL without EFER.SCE", UD, 0, USER(call_system_at));
    TRAPS(sysret_off, "SYSRET without EFER.SCE", "", "sysretq", UD, 0);
    wrmsr(EFER, rdmsr(EFER) | 1);
}

static void system_enter(void) {
    USER_PROBE(enter_system, "mov %rsp, %r10; lea 1f(%rip), %r9", "sysenter; ud2; 1:");
    if (!is_intel()) {
        run_user(enter_system, 0);
        check_trap("SYSENTER in long mode, not on Intel", UD, 0, USER(enter_system_at));
        return;
    }
    wrmsr(SYSENTER_CS, 0);
    run_user(enter_system, 0);
    check_trap("SYSENTER without a code segment", GP, 0, USER(enter_system_at));
    TRAPS(sysexit_off, "SYSEXIT without a code segment", "", "sysexitq", GP, 0);
    wrmsr(SYSENTER_CS, SYSENTER_BASE);
    wrmsr(SYSENTER_ESP, (reg)kernel_stack + 4096);
    wrmsr(SYSENTER_EIP, (reg)sysenter_entry);
    run_user(enter_system, 0);
    check_trap("SYSENTER and SYSEXIT return", USER_END, 0, USER(enter_system_next) + 2);
    check("CS", entry_seen[2], SYSENTER_BASE);
    check("SS", entry_seen[3], SYSENTER_BASE + 8);
    check("RSP", entry_seen[4], (reg)kernel_stack + 4096);
    check("SYSEXIT's CS", last.cs, SYSENTER_BASE + 32 + 3);
    check("SYSEXIT's SS", last.ss, SYSENTER_BASE + 40 + 3);
    wrmsr(SYSENTER_EIP, (reg)sysenter_entry_32);
    run_user(enter_system, 0);
    check_trap("SYSEXIT to 32-bit code", USER_END, 0, 0);
    check("its CS", last.cs, SYSENTER_BASE + 16 + 3);
    USER_TRAPS(sysexit_user, "SYSEXIT at CPL 3", "", "sysexitq", GP, 0);
}

/* ---- far transfers */

static void far_transfers(void) {
    extern volatile u64 far_result[4];
    PROBE(far_loop, "", "push $0x08; lea 1f(%rip), %rax; push %rax; lretq; ud2; 1:");
    run_kernel(far_loop, 0);
    check_trap("a far return to itself", NO_TRAP, 0, 0);
    PROBE(far_jump, "", "rex.w ljmp *far_pointer(%rip)\nud2\nfar_landing: nop");
    asm(".pushsection .data\nfar_pointer: .quad far_landing; .word 0x08\nfar_null: .quad 0; .word 0\n"
        "far_user: .quad 0; .word 0x33\n.popsection");
    run_kernel(far_jump, 0);
    check_trap("a far jump through memory", NO_TRAP, 0, 0);
    TRAPS(far_to_null, "a far jump to null", "", "rex.w ljmp *far_null(%rip)", GP, 0);
    TRAPS(far_to_user, "a far jump to CPL 3", "", "rex.w ljmp *far_user(%rip)", GP, 0x30);
    PROBE(iret_self, "mov %ss, %eax; mov %rsp, %rcx",
          "push %rax; push %rcx; push $0xd7; push $0x08; lea 1f(%rip), %rax; push %rax; iretq; ud2; 1:\n"
          "pushf; pop far_result(%rip)");
    run_kernel(iret_self, 0);
    check_trap("IRETQ to itself", NO_TRAP, 0, 0);
    check("loads the flags", far_result[0], 0xd7);
    TRAPS(iret_nested, "IRET with NT in long mode", "push $0x4002; popf", "iretq", GP, 0);
    set_flags(2);

    /* A 64-bit call gate from CPL 3 (16 bytes). */
    extern char gate_target[];
    asm(".pushsection .text.probes, \"ax\"\n"
        "gate_target: mov %rsp, far_result+8(%rip); mov %ss, %eax; mov %eax, far_result+16(%rip); rex.w lret\n"
        ".popsection\n.pushsection .data\ngate_pointer: .long 0; .word 0x93\n.popsection");
    u64 to = (reg)gate_target;
    u64 *gate = &gdt[FREE_SELECTOR >> 3];
    gate[0] = (to & 0xffff) | KERNEL_CODE << 16 | 0xecull << 40 | (to >> 16 & 0xffff) << 48;
    gate[1] = to >> 32;
    USER_PROBE(through_gate, "mov %rsp, %rbx", "lcall *gate_pointer(%rip); sub %rsp, %rbx; mov %rbx, %rsi");
    run_user(through_gate, 0);
    check_trap("a call gate from CPL 3 returns", USER_END, 0, 0);
    check("it ran on RSP0, four words deep", far_result[1], tss.sp0 - 32);
    check("with a null SS", far_result[2], 0);
    gate[0] &= ~(0x60ull << 40);
    USER_TRAPS(gate_denied, "a call gate of DPL 0 from CPL 3", "", "lcall *gate_pointer(%rip)", GP, FREE_SELECTOR);
    gate[0] = (gate[0] | 0x60ull << 40) & ~(0x80ull << 40);
    USER_TRAPS(gate_absent, "a call gate that is not present", "", "lcall *gate_pointer(%rip)", NP, FREE_SELECTOR);
    gate[0] |= 0x80ull << 40;
    gate[1] = 1ull << 40;
    USER_TRAPS(gate_upper, "a call gate whose upper half has a type", "", "lcall *gate_pointer(%rip)", GP, FREE_SELECTOR);
}
volatile u64 far_result[4];

/* ---- FS and GS bases */

static void bases(void) {
    static u64 words[2] = {0x1111, 0x2222};
    extern volatile u64 base_result[2];
    wrmsr(FS_BASE, (reg)words);
    wrmsr(GS_BASE, (reg)&words[1]);
    wrmsr(KERNEL_GS_BASE, (reg)words);
    PROBE(read_bases, "", "mov %fs:0, %rax; mov %rax, base_result(%rip); mov %gs:0, %rax; mov %rax, base_result+8(%rip)");
    run_kernel(read_bases, 0);
    check("FS has the MSR's base", base_result[0], 0x1111);
    check("GS has the MSR's base", base_result[1], 0x2222);
    PROBE(swap, "", "swapgs");
    run_kernel(swap, 0);
    run_kernel(read_bases, 0);
    check("SWAPGS takes the other base", base_result[1], 0x1111);
    check("and stores the first", rdmsr(KERNEL_GS_BASE), (reg)&words[1]);
    run_kernel(swap, 0);
    check("twice is nothing", rdmsr(GS_BASE), (reg)&words[1]);
    TRAPS(base_odd, "a base that is not canonical", "mov $0xc0000100, %ecx; xor %eax, %eax; mov $0x8000, %edx", "wrmsr", GP, 0);
    set_gdt(FREE_SELECTOR, 0x12345678, 0xfffff, 0x93, 0xc);
    PROBE(load_gs, "mov $0x90, %eax", "mov %eax, %gs");
    run_kernel(load_gs, 0);
    check("a selector loads a 32-bit base", rdmsr(GS_BASE), 0x12345678);
    if (!cpu_has(7, 0, 1, 0)) {
        skip("FSGSBASE", "not in CPUID");
        return;
    }
    TRAPS(fsgs_off, "RDFSBASE without CR4.FSGSBASE", "", "rdfsbase %rax", UD, 0);
    set_cr4(get_cr4() | CR4_FSGSBASE);
    USER_PROBE(user_bases, "mov $0x123456789a, %rax", "wrfsbase %rax; mov $-16, %rax; wrgsbase %rax");
    run_user(user_bases, 0);
    check_trap("WRFSBASE and WRGSBASE at CPL 3", USER_END, 0, 0);
    check("FS's base", rdmsr(FS_BASE), 0x123456789a);
    check("GS's base", rdmsr(GS_BASE), -16ul);
    PROBE(short_base, "mov $-1, %rax; wrfsbase %eax", "rdfsbase %rcx; mov %rcx, base_result(%rip)");
    run_kernel(short_base, 0);
    check("WRFSBASE of 32 bits extends by zeroes", base_result[0], 0xffffffff);
    USER_TRAPS(fs_odd, "WRFSBASE of an address that is not canonical", "mov $1, %eax; shl $47, %rax", "wrfsbase %rax", GP, 0);
    wrmsr(FS_BASE, 1ull << 46);
    TRAPS(base_ignored, "DS has no base", "", "movl %ds:gdt, %eax", NO_TRAP, 0);
    TRAPS(base_used, "FS's base is used", "", "movl %fs:gdt, %eax", PF, 0);
    check("in full", last.cr2, (1ul << 46) + (reg)gdt);
    set_cr4(get_cr4() & ~(reg)CR4_FSGSBASE);
}
volatile u64 base_result[2];

void bare_main(void) {
    round_trip();
    compatibility();
    system_calls();
    system_enter();
    far_transfers();
    bases();
}
