/* Starts application processors through real mode, as a kernel does (SDM 3A 9.4.4). */
#include "smp.h"
#include "acpi.h"

u32 cpus = 1;
volatile u32 online;
u8 ap_stacks[MAX_CPUS][8192] __attribute__((aligned(16)));
static void (*volatile job)(u32);
static volatile u32 job_number, finished;

/* The start-up page, where a SIPI of vector 8 begins. */
#define START 0x8000
extern char ap_start[], ap_start_end[];
asm(".pushsection .text\n"
    ".code16\n"
    "ap_start:\n"
    "    cli; mov %cs, %ax; mov %ax, %ds\n"
    "    lgdtl ap_gdt - ap_start\n"
    "    mov %cr0, %eax; and $~0x60000000, %eax; or $1, %eax; mov %eax, %cr0\n"
    "    ljmpl $0x18, $0x8000 + ap_protected - ap_start\n"
    ".code32\n"
    "ap_protected:\n"
    "    mov $0x10, %eax; mov %eax, %ds; mov %eax, %ss\n"
    "    mov $0x6a0, %eax; mov %eax, %cr4; mov $boot_pml4, %eax; mov %eax, %cr3\n"
    "    mov $0xc0000080, %ecx; rdmsr; or $0x901, %eax; wrmsr\n"
    "    mov %cr0, %eax; and $~4, %eax; or $0x80010023, %eax; mov %eax, %cr0\n"
    "    ljmp $0x08, $ap_long\n"
    "ap_gdt: .word 511; .long gdt\n"
    "ap_start_end:\n"
    ".code64\n"
    "ap_long:\n"
    "    mov $0x10, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss\n"
    "    mov $0xfee00020, %eax; mov (%rax), %edi; shr $24, %edi\n" /* the APIC id */
    "    lea 1(%rdi), %eax; shl $13, %eax; lea ap_stacks(%rax), %rsp\n"
    "    lidt idt_pointer; fninit; call ap_main\n"
    ".popsection");

static void woken(struct frame *f) {
    (void)f;
    apic_eoi();
}

void ap_main(u32 id) {
    u32 seen = job_number;
    apic_on();
    __atomic_fetch_or(&online, 1u << id, __ATOMIC_SEQ_CST);
    for (;;) {
        while (seen == job_number)
            wait_interrupt();
        seen++;
        job(id);
        atomic_add(&finished, 1);
    }
}

void on_all(void (*what)(u32)) {
    job = what;
    finished = 0;
    job_number++;
    if (cpus > 1)
        apic_write(APIC_ICR, ICR_OTHERS | ICR_ASSERT | WAKE_VECTOR);
    what(apic_id());
    if (!wait_until(finished == cpus - 1))
        die("a processor did not finish its job");
}

int start_processor(u32 id) {
    apic_send(id, ICR_INIT | ICR_ASSERT);
    for (int i = 0; i < 1000; i++)
        pause();
    for (int attempt = 0; attempt < 2 && !(online >> id & 1); attempt++) {
        apic_send(id, ICR_STARTUP | ICR_ASSERT | START >> 12);
        u64 start = rdtsc();
        while (!(online >> id & 1) && rdtsc() - start < PATIENCE / 4)
            pause();
    }
    return online >> id & 1;
}

void smp_start(void) {
    apic_on();
    handlers[WAKE_VECTOR] = woken;
    memcpy((void *)START, ap_start, ap_start_end - ap_start);
    u32 self = apic_id();
    online = 1u << self;
    const u8 *madt = acpi_table("APIC");
    if (!madt)
        return;
    u32 length = acpi_u32(madt + 4);
    for (u32 at = 44; at + 2 <= length && madt[at + 1]; at += madt[at + 1]) {
        u32 id = madt[at + 3];
        /* Type 0: a processor with its APIC id; bit 0 of its flags: it may be used. */
        if (madt[at] || !(acpi_u32(madt + at + 4) & 1) || id == self || id >= MAX_CPUS)
            continue;
        if (!start_processor(id)) {
            say("processor %d does not start\n", id);
            die("a processor of the MADT does not start");
        }
        cpus++;
    }
}
