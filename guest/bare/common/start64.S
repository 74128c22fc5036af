/* Multiboot 1 entry, long mode with identity paging, and the trap stubs of 64-bit bare programs. */
    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 0, -0x1badb002

    .text
    .code32
    .globl _start
_start:
    cli
    cld
    mov $stack_top, %esp
    mov %eax, boot_magic
    mov %ebx, boot_info

    /* PDPT[0] maps the first GiB for the kernel, PDPT[2] is the same GiB again for user mode, PDPT[3] is MMIO. */
    movl $boot_pdpt + 7, boot_pml4
    movl $boot_pd + 3, boot_pdpt
    movl $boot_pd + 7, boot_pdpt + 16
    movl $boot_mmio_pd + 3, boot_pdpt + 24
    xor %ecx, %ecx
1:  mov %ecx, %eax
    shl $21, %eax
    mov %eax, %edx
    or $0x87, %eax
    mov %eax, boot_pd(, %ecx, 8)
    add $0xc0000000, %edx
    or $0x9b, %edx
    mov %edx, boot_mmio_pd(, %ecx, 8)
    inc %ecx
    cmp $512, %ecx
    jne 1b

    mov $boot_pml4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x6a0, %eax             /* PAE, PGE, OSFXSR, OSXMMEXCPT */
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x901, %eax             /* LME, NXE, SCE */
    wrmsr
    mov %cr0, %eax
    and $~0x60000004, %eax      /* caches on, no x87 emulation */
    or $0x80010023, %eax        /* PG, WP, NE, MP, PE */
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x08, $enter64

    .code64
enter64:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $stack_top, %rsp
    fninit
    call setup
    call bare_main
    call done
1:  hlt
    jmp 1b

/* Trap stubs, 16 bytes each; vectors that push an error code of their own skip the zero. */
    .balign 16
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    push $0
    .endif
    pushq $vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    push %rax
    push %rcx
    push %rdx
    push %rbx
    push %rbp
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, %rbx
    mov %rsp, %rdi
    cld
    and $-16, %rsp
    call trap
    mov %rbx, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rbp
    pop %rbx
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

/* int guarded(rip, argument): calls at CPL 0; 1 when a trap ended the call. */
    .globl guarded
guarded:
    call save_recovery
    mov %rdi, %rax
    mov %rsi, %rdi
    call *%rax
    xor %eax, %eax
    jmp leave_guard

/* int guarded_user(rip, argument, cs, rsp): the same at CPL 3, left only by a trap. */
    .globl guarded_user
guarded_user:
    call save_recovery
    pushq $0x2b
    push %rcx
    pushq user_flags
    push %rdx
    push %rdi
    mov %rsi, %rdi
    iretq

/* Keeps the callee-saved registers on the stack and its address for the trap handler. */
save_recovery:
    pop %rax
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, recovery_stack
    movl $1, recovery_active
    jmp *%rax

    .globl recovery_point
recovery_point:
    mov $1, %eax
leave_guard:
    movl $0, recovery_active
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .bss
    .balign 4096
    .globl boot_pml4, boot_pdpt, boot_pd
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd: .skip 4096
boot_mmio_pd: .skip 4096
    .skip 32768
    .globl stack_top
stack_top:
    .section .note.GNU-stack, "", @progbits
