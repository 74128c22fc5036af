/* Multiboot 1 entry and trap stubs of 32-bit bare programs: flat segments, paging off. */
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
    mov %cr0, %eax
    and $~0x60000004, %eax
    or $0x10023, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x08, $1f
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %eax, %fs
    mov %eax, %gs
    fninit
    call setup
    call bare_main
    call done
1:  hlt
    jmp 1b

    .balign 16
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    push $0
    .endif
    pushl $vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    pusha
    mov %ds, %eax
    push %eax
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    cld
    mov %esp, %ebx
    push %esp
    call trap
    mov %ebx, %esp
    pop %eax
    mov %eax, %ds
    mov %eax, %es
    popa
    add $8, %esp
    iret

/* int guarded(eip, argument): calls at CPL 0; 1 when a trap ended the call. */
    .globl guarded
guarded:
    pusha
    mov %esp, recovery_stack
    movl $1, recovery_active
    mov 40(%esp), %eax
    push %eax
    call *40(%esp)
    mov recovery_stack, %esp
    movl $0, recovery_active
    popa
    xor %eax, %eax
    ret

/* int guarded_user(eip, argument, cs, esp): the same at CPL 3, left only by a trap; the argument is in EAX. */
    .globl guarded_user
guarded_user:
    pusha
    mov %esp, recovery_stack
    movl $1, recovery_active
    mov 36(%esp), %ecx
    mov 40(%esp), %eax
    mov 44(%esp), %edx
    mov 48(%esp), %esi
    pushl $0x2b
    push %esi
    pushl user_flags
    push %edx
    push %ecx
    mov $0x2b, %edx
    mov %edx, %ds
    mov %edx, %es
    iret

    .globl recovery_point
recovery_point:
    mov $0x10, %ecx
    mov %ecx, %ds
    mov %ecx, %es
    movl $0, recovery_active
    popa
    mov $1, %eax
    ret

    .bss
    .balign 4096
    .skip 32768
    .globl stack_top
stack_top:
    .section .note.GNU-stack, "", @progbits
