/* Debug exceptions (SDM 3B, chapter 18): single step, code, data and I/O break points, DR6 and DR7. */
#include "common/capture.h"

enum { TF = 1 << 8, RF = 1 << 16 };
enum { DR6_FIXED = 0xffff0ff0u, DR6_BD = 1 << 13, DR6_BS = 1 << 14 };
#define DEBUG_REGISTER(n)                                                                                               \
    static inline reg get_dr##n(void) { reg v; asm volatile("mov %%dr" #n ", %0" : "=r"(v)); return v; }               \
    static inline void set_dr##n(reg v) { asm volatile("mov %0, %%dr" #n ::"r"(v) : "memory"); }
DEBUG_REGISTER(0)
DEBUG_REGISTER(1)
DEBUG_REGISTER(2)
DEBUG_REGISTER(3)
DEBUG_REGISTER(6)
DEBUG_REGISTER(7)

/* Every #DB since `start_debug`: where, with what in DR6 and in the frame's flags. */
static volatile reg step_ip[64], step_dr6[64], step_flags[64];
static volatile u32 steps;

static void debugged(struct frame *f) {
    if (steps < ARRAY_SIZE(step_ip)) {
        step_ip[steps] = f->ip;
        step_dr6[steps] = get_dr6();
        step_flags[steps] = f->flags;
    }
    steps++;
    set_dr6(DR6_FIXED);
    /* The processor put RF into the frame; where it did not (QEMU), this ends the loop, and the checks fail. */
    if (steps > 8 && f->ip == step_ip[0])
        f->flags |= RF;
}

static void start_debug(void) {
    handlers[DB] = debugged;
    steps = 0;
    set_dr6(DR6_FIXED);
}

#define STEP_ON "pushf; orl $0x100, (%rsp); popf\n"
#define STEP_OFF "pushf; andl $~0x100, (%rsp); popf"

static void single_step(void) {
    /* Sub-labels of what is stepped over. */
    extern char step_a[], step_b[], step_c[], step_d[], ss_a[], rep_a[], rep_b[], int_a[];
    PROBE(stepped, STEP_ON, "step_a: nop\n step_b: xor %eax, %eax\n step_c: jmp step_d\n nop\n step_d: " STEP_OFF);
    start_debug();
    run_kernel(stepped, 0);
    check("six instructions behind POPF are stepped", steps, 6);
    check("the first step ends behind the first instruction", step_ip[0], (reg)step_b);
    check("DR6.BS", step_dr6[0], DR6_FIXED | DR6_BS);
    check("then behind the second", step_ip[1], (reg)step_c);
    check("then at the jump's target", step_ip[2], (reg)step_d);
    check("the frame of a step has TF", step_flags[0] & TF, TF);
    check("and no RF", step_flags[0] & RF, 0);
    (void)step_a;

    PROBE(stepped_ss, "mov %ss, %ecx\n" STEP_ON, "mov %ecx, %ss\n nop\n ss_a: " STEP_OFF);
    start_debug();
    run_kernel(stepped_ss, 0);
    check("no step between MOV SS and the next instruction", step_ip[0], (reg)ss_a);

    PROBE(stepped_rep, "lea rep_target(%rip), %rdi; mov $3, %ecx; cld\n" STEP_ON, "rep_a: rep stosb\n rep_b: " STEP_OFF);
    start_debug();
    run_kernel(stepped_rep, 0);
    check("each repetition is a step", step_ip[0] == (reg)rep_a && step_ip[1] == (reg)rep_a && step_ip[2] == (reg)rep_b, 1);

    PROBE(stepped_int, STEP_ON, "int $0x70\n int_a: nop\n" STEP_OFF);
    handlers[0x70] = capture;
    start_debug();
    run_kernel(stepped_int, 0);
    handlers[0x70] = 0;
    check("INT's frame has TF", seen.flags & TF, TF);
    check("INT's handler is not stepped", step_ip[0], (reg)int_a + 1);
    set_flags(2);
    start_debug();
    user_flags = 2 | TF;
    extern char user_step_a[];
    USER_PROBE(stepped_user, "nop", "user_step_a: int $0x80");
    (void)user_step_a;
    handlers[DB] = 0;
    run_user(stepped_user, 0);
    check_trap("IRET to CPL 3 with TF steps one instruction", DB, 0, USER(stepped_user_at));
    user_flags = 2;
    PROBE(int1, "", ".byte 0xf1");
    set_dr6(DR6_FIXED);
    run_kernel(int1, 0);
    check_trap("INT1 is a trap", DB, 0, (reg)int1_next);
    PROBE(int_3, "", "int3");
    run_kernel(int_3, 0);
    check_trap("INT3 is a trap", BP, 0, (reg)int_3_next);
    check("and its frame has no RF", last.flags & RF, 0);
}
u8 rep_target[64] __attribute__((aligned(16)));

enum { ON_EXECUTE = 0, ON_WRITE = 1, ON_IO = 2, ON_ACCESS = 3 };
/* DR7 for break point n (SDM 3B 18.2.4), global. */
static reg dr7_for(int n, int kind, int length) {
    static const u8 lengths[] = {0, 0, 1, 0, 3, 0, 0, 0, 2};
    return 0x400 | 2 << (2 * n) | (reg)kind << (16 + 4 * n) | (reg)lengths[length] << (18 + 4 * n);
}

PROBE(touch_write1, "", "movb $0, (%rdi)");
PROBE(touch_write8, "", "movq $0, (%rdi)");
PROBE(touch_read4, "", "movl (%rdi), %eax");
PROBE(touch_add, "", "lock addl $1, (%rdi)");

/* How often touching this address traps; and each time behind the instruction. */
static u32 hits(const char *code, const char *next, reg address) {
    start_debug();
    run_kernel(code, address);
    handlers[DB] = 0;
    for (u32 i = 0; i < steps; i++)
        if (step_ip[i] != (reg)next)
            return 100 + i;
    return steps;
}
#define HITS(probe, address) hits(probe, probe##_next, address)

static void break_points(void) {
    reg at = (reg)rep_target + 16;
    PROBE(three, "nop", "nop");
    set_dr0((reg)three_at);
    set_dr7(dr7_for(0, ON_EXECUTE, 1));
    check("DR7 reads back", get_dr7(), 0x402);
    start_debug();
    run_kernel(three, 0);
    check("a code break point hits once, RF passes it", steps, 1);
    check("at its instruction, before it", step_ip[0], (reg)three_at);
    check("DR6.B0", step_dr6[0], DR6_FIXED | 1);
    check("its frame has RF", step_flags[0] & RF, RF);
    set_dr7(0x400);
    start_debug();
    run_kernel(three, 0);
    check("no break point when disabled", steps, 0);
    set_dr0(0);
    set_dr3((reg)three_at);
    set_dr7(dr7_for(3, ON_EXECUTE, 1));
    start_debug();
    run_kernel(three, 0);
    check("DR3's code break point", step_dr6[0], DR6_FIXED | 8);
    set_dr7(0x400);

    set_dr1(at);
    set_dr7(dr7_for(1, ON_WRITE, 4));
    check("a write to a data break point", HITS(touch_write1, at + 3), 1);
    check("DR6.B1", step_dr6[0], DR6_FIXED | 2);
    check("a data break point's frame has no RF", step_flags[0] & RF, 0);
    check("a write behind it", HITS(touch_write1, at + 4), 0);
    check("a write before it", HITS(touch_write1, at - 1), 0);
    check("a wide write that reaches it", HITS(touch_write8, at - 7), 1);
    check("a wide write that does not", HITS(touch_write8, at - 8), 0);
    check("a read of a write break point", HITS(touch_read4, at), 0);
    check("a locked addition", HITS(touch_add, at), 1);
    set_dr7(dr7_for(1, ON_ACCESS, 1));
    check("a read of an access break point", HITS(touch_read4, at - 3), 1);
    check("a write of an access break point", HITS(touch_write1, at), 1);
    set_dr7(dr7_for(1, ON_WRITE, 8));
    check("eight bytes long", HITS(touch_write1, at + 7), 1);
    set_dr2(at + 2);
    set_dr7(dr7_for(1, ON_WRITE, 4) | dr7_for(2, ON_WRITE, 2));
    check("two at once trap once", HITS(touch_write8, at), 1);
    check("DR6 names both", step_dr6[0], DR6_FIXED | 6);
    PROBE(rep_stos, "mov $8, %ecx; cld; xor %eax, %eax", "rep stosb");
    set_dr7(dr7_for(1, ON_WRITE, 1));
    start_debug();
    run_kernel(rep_stos, at - 2);
    handlers[DB] = 0;
    check("inside a REP STOSB", steps, 1);
    set_dr7(0x400);
    extern char break_ss_a[];
    set_dr1((reg)rep_target + 32);
    *(u16 *)(rep_target + 32) = KERNEL_DATA;
    set_dr7(dr7_for(1, ON_ACCESS, 2));
    PROBE(break_ss, "", "movw rep_target+32(%rip), %ss\n nop\n break_ss_a: nop");
    start_debug();
    run_kernel(break_ss, 0);
    check("MOV SS holds a data break point back by an instruction", steps == 1 ? step_ip[0] : steps, (reg)break_ss_a);
    set_dr7(0x400);
    handlers[DB] = 0;

    set_cr4(get_cr4() | 8);
    set_dr2(0x80);
    set_dr7(dr7_for(2, ON_IO, 1));
    PROBE(port_out, "", "outb %al, $0x80");
    start_debug();
    run_kernel(port_out, 0);
    check("an I/O break point", steps == 1 ? step_ip[0] : steps, (reg)port_out_next);
    handlers[DB] = 0;
    set_dr7(0x400);
    TRAPS(dr4, "DR4 with CR4.DE", "", "mov %dr4, %rax", UD, 0);
    set_cr4(get_cr4() & ~8ul);
    TRAPS(dr4_alias, "DR4 without CR4.DE", "", "mov %dr4, %rax", NO_TRAP, 0);
    TRAPS(dr6_high, "DR6 bit 32", "mov $1, %eax; shl $32, %rax", "mov %rax, %dr6", GP, 0);
    TRAPS(dr7_high, "DR7 bit 32", "mov $1, %eax; shl $32, %rax", "mov %rax, %dr7", GP, 0);
    set_dr6(DR6_FIXED);
    set_dr7(0x400 | 1 << 13);
    TRAPS(general_detect, "DR7.GD guards debug registers", "", "mov %dr0, %rax", DB, 0);
    check("DR6.BD", get_dr6() & (DR6_BD | DR6_BS | 15), DR6_BD);
    check("the handler finds GD clear", get_dr7(), 0x400);
    set_dr6(DR6_FIXED);
}

void bare_main(void) {
    single_step();
    break_points();
}
