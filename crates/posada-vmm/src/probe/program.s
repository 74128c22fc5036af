# The probe program: what an operating system asks of a processor, in small. `program.rs` has the constants, says what each
# phase is for, and computes what each must answer. It is linked to run at BASE in an otherwise zeroed RAM of 4 MiB, starts in
# 32-bit protected mode without paging, and tells the host by two ports: MARK begins a phase or ends the run, RESULT ends a
# phase with its checksum.
#
#   1000  PML4 of address space A         8000  end of the kernel stack
#   2000  PML4 of address space B         9000  end of the user stack
#   3000  PDPT of the low addresses       a000  a word that tells A from B (at 20a000 for B)
#   4000  their page directory            b000  table of the phase "compute"
#   5000  page table of 0-2 MiB, 1:1      c000  PDPT of B's upper addresses
#   6000  page table of FAULTS, empty     d000  their page directory
#  10000  BASE                          300000  RAM behind FAULTS
#
# Addresses from UPPER on are 0, 1, 2... in A, and 2 MiB, 2 MiB + 1... in B.

    .pushsection .rodata.posada_probe, "a", @progbits
    .globl posada_probe_start, posada_probe_end
    .hidden posada_probe_start, posada_probe_end
    .balign 16

    .set PML4_A, 0x1000
    .set PML4_B, 0x2000
    .set PDPT, 0x3000
    .set DIRECTORY, 0x4000
    .set LOW_TABLE, 0x5000
    .set FAULT_TABLE, 0x6000
    .set KERNEL_STACK, 0x8000
    .set USER_STACK, 0x9000
    .set WORD, 0xa000
    .set TABLE, 0xb000
    .set PDPT_B, 0xc000
    .set DIRECTORY_B, 0xd000
    .set B_OFFSET, 0x200000
    .set FAULTS, 0x200000
    .set FAULT_RAM, 0x300000
    .set UPPER, 0x8000000000

    # Present, writable, user; the same for a 2 MiB page.
    .set PAGE, 7
    .set LARGE_PAGE, 0x87

    # Selectors, in the order that SYSCALL and SYSRET want (AMD APM 2, 6.1.1).
    .set KERNEL_CODE, 0x08
    .set KERNEL_DATA, 0x10
    .set USER_BASE, 0x1b
    .set USER_DATA, 0x23
    .set USER_CODE, 0x2b
    .set TASK, 0x30

    .set TIMER_VECTOR, 0x20

    .macro begin phase
    movl $\phase, %eax
    outl %eax, ${MARK}
    .endm

    # Takes a word into the checksum in R12: FNV-1a by words. R13 holds the prime.
    .macro fold register
    xorq \register, %r12
    imulq %r13, %r12
    .endm

    # Ends a phase with the halves of its checksum on top of each other, and begins the next checksum.
    .macro result
    movq %r12, %rax
    shrq $32, %rax
    xorl %r12d, %eax
    outl %eax, ${RESULT}
    movabsq ${SEED}, %r12
    .endm

    .macro write_msr number, low, high=$0
    movl $\number, %ecx
    movl \low, %eax
    movl \high, %edx
    wrmsr
    .endm

    # Goes to `code` in user mode; its SYSCALL leads behind this, still with the user's stack.
    .macro call_user code, back
    movl $KERNEL_STACK, %esp
    leaq \back(%rip), %r14
    leaq \code(%rip), %rax
    pushq $USER_DATA
    pushq $USER_STACK
    pushq $2
    pushq $USER_CODE
    pushq %rax
    iretq
\back:
    .endm

    .code32
posada_probe_start:
    # ---- Phase 0: protected mode. Page tables, descriptor tables, and the step into long mode.
    begin 0
    cld
    movl $KERNEL_STACK, %esp
    movl $(PDPT + PAGE), PML4_A
    movl $(PDPT + PAGE), PML4_A + 8
    movl $(PDPT + PAGE), PML4_B
    movl $(PDPT_B + PAGE), PML4_B + 8
    movl $(DIRECTORY + PAGE), PDPT
    movl $(DIRECTORY_B + PAGE), PDPT_B
    movl $(LOW_TABLE + PAGE), DIRECTORY
    movl $(FAULT_TABLE + PAGE), DIRECTORY + 8
    movl $(B_OFFSET + LARGE_PAGE), DIRECTORY_B
    movl $LOW_TABLE, %edi
    movl $PAGE, %eax
    movl $512, %ecx
1:  movl %eax, (%edi)
    addl $0x1000, %eax
    addl $8, %edi
    loop 1b

    # Its words once more, through a call with a stack frame, so that the phase has a result.
    xorl %ebx, %ebx
    movl $LOW_TABLE, %esi
    movl $512, %ecx
2:  lodsl
    addl $4, %esi
    pushl %eax
    call .Lmix
    loop 2b
    movl %ebx, %ebp

    lgdtl .Lgdt_pointer - posada_probe_start + {BASE}
    movl $0x20, %eax
    movl %eax, %cr4
    movl $PML4_A, %eax
    movl %eax, %cr3
    write_msr 0xc0000080, $0x101
    movl %cr0, %eax
    orl $0x80010001, %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CODE, $(.Llong - posada_probe_start + {BASE})

    # EBX = rotated EBX xor the argument, which it takes from the stack.
.Lmix:
    pushl %ebp
    movl %esp, %ebp
    roll $5, %ebx
    xorl 8(%ebp), %ebx
    popl %ebp
    ret $4

    .code64
.Llong:
    movl $KERNEL_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $KERNEL_STACK, %esp
    movl $TASK, %eax
    ltr %ax
    lidt .Lidt_pointer(%rip)
    # STAR, LSTAR and FMASK: where SYSCALL goes and what it does to RFLAGS.
    write_msr 0xc0000081, $0, $(USER_BASE << 16 | KERNEL_CODE)
    write_msr 0xc0000082, $(.Lenter_kernel - posada_probe_start + {BASE})
    write_msr 0xc0000084, $0x47700
    movabsq ${PRIME}, %r13
    movabsq ${SEED}, %r12
    fold %rbp
    result

    # ---- Phase 1: compute. Arithmetic, a table in memory and branches.
    begin 1
    movl ${COMPUTE}, %ecx
    movq %r12, %rdx
1:  movq %rdx, %rax
    shlq $13, %rax
    xorq %rax, %rdx
    movq %rdx, %rax
    shrq $7, %rax
    xorq %rax, %rdx
    movq %rdx, %rax
    shlq $17, %rax
    xorq %rax, %rdx
    movl %edx, %eax
    andl $511, %eax
    addq %rdx, TABLE(, %rax, 8)
    testb $3, %dl
    jnz 2f
    movq TABLE(, %rax, 8), %rsi
    fold %rsi
2:  decl %ecx
    jnz 1b
    result

    # ---- Phase 2: page faults. User mode writes to pages that are not there, until all are; then they go.
    begin 2
    movl ${ROUNDS}, %ebx
.Lround:
    call_user .Ltouch, .Lround_end
    fold %rdx
    movl $FAULTS, %edi
    movl $FAULT_TABLE, %esi
    movl ${PAGES}, %ecx
1:  movq (%rsi), %rax
    fold %rax
    movq $0, (%rsi)
    invlpg (%rdi)
    addq $8, %rsi
    addq $0x1000, %rdi
    decl %ecx
    jnz 1b
    decl %ebx
    jnz .Lround
    result

    # ---- Phase 3: system calls. User mode asks with a number that grows.
    begin 3
    movl ${CALLS}, %ebx
    call_user .Lask, .Lasked
    fold %rax
    movl %cs, %esi
    fold %rsi
    decl %ebx
    jz 1f
    sysretq
1:  movl $KERNEL_STACK, %esp
    result

    # ---- Phase 4: address spaces. One address, in each of them another word.
    begin 4
    movabsq $(UPPER + WORD), %rdi
    movl ${SWITCHES}, %ebx
1:  movl $PML4_B, %eax
    movq %rax, %cr3
    addq %rbx, (%rdi)
    fold (%rdi)
    movl $PML4_A, %eax
    movq %rax, %cr3
    incq (%rdi)
    fold (%rdi)
    decl %ebx
    jnz 1b
    result

    # ---- Phase 5: devices. The host answers a port.
    begin 5
    movl ${READS}, %ebx
1:  inl ${MARK}, %eax
    fold %rax
    decl %ebx
    jnz 1b
    result

    # ---- Phase 6: timer. The local APIC's, in x2APIC mode, wakes a halted processor (Intel SDM 3A, 11.12.1).
    begin 6
    movl $0x1b, %ecx
    rdmsr
    orl $0xc00, %eax
    wrmsr
    write_msr 0x80f, $0x1ff
    write_msr 0x83e, $0xb
    write_msr 0x832, $TIMER_VECTOR
    movl ${TICKS}, %ebx
1:  write_msr 0x838, ${TIMER_COUNT}
    sti
.Lsleep:
    hlt
    cli
    # The current count: it stays zero.
    movl $0x839, %ecx
    rdmsr
    fold %rax
    decl %ebx
    jnz 1b
    result

    movl ${DONE}, %eax
    outl %eax, ${MARK}
1:  hlt
    jmp 1b

.Lenter_kernel:
    jmpq *%r14

.Lpage_fault:
    popq %r8
    movq %cr2, %r9
    fold %r8
    fold %r9
    andq $-0x1000, %r9
    leaq FAULT_RAM - FAULTS + PAGE(%r9), %r8
    shrq $9, %r9
    movq %r8, FAULT_TABLE - (FAULTS >> 9)(%r9)
    iretq

.Ltick:
    fold %rbx
    # QEMU's processor, when it runs KVM, lets an interrupt in between STI and HLT: it has woken us all the same.
    leaq .Lsleep(%rip), %r8
    xorl %r9d, %r9d
    cmpq %r8, (%rsp)
    sete %r9b
    addq %r9, (%rsp)
    write_msr 0x80b, $0
    iretq

    # ---- User mode.
.Ltouch:
    movl $FAULTS, %esi
    movl ${PAGES}, %edi
    xorl %edx, %edx
1:  movq %rbx, 8(%rsi)
    addq %rbx, (%rsi)
    addq (%rsi), %rdx
    addq $0x1000, %rsi
    decl %edi
    jnz 1b
    syscall

.Lask:
    xorl %eax, %eax
1:  addl $3, %eax
    syscall
    jmp 1b

    # ---- Tables. BASE is a multiple of 64 KiB and the program is smaller, so an offset in it is an address's low half.
    .balign 8
.Lgdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .word 103, .Ltask - posada_probe_start
    .byte {BASE} >> 16, 0x89, 0, 0
    .quad 0
.Lgdt_end:

    .macro gate handler
    .word \handler - posada_probe_start, KERNEL_CODE
    .byte 0, 0x8e
    .word {BASE} >> 16
    .quad 0
    .endm

.Lidt:
    .fill 14 * 2, 8, 0
    gate .Lpage_fault
    .fill (TIMER_VECTOR - 15) * 2, 8, 0
    gate .Ltick
.Lidt_end:

.Lgdt_pointer:
    .word .Lgdt_end - .Lgdt - 1
    .long .Lgdt - posada_probe_start + {BASE}
.Lidt_pointer:
    .word .Lidt_end - .Lidt - 1
    .quad .Lidt - posada_probe_start + {BASE}

.Ltask:
    .long 0
    .quad KERNEL_STACK
    .fill 92, 1, 0

posada_probe_end:
    .popsection
