/*
 * Multiboot 1 header, 32-bit entry, and the two interrupt stubs of the guest.
 * QEMU's -kernel loads the ELF file and jumps to _start in protected mode.
 */
    .set FLAGS, 0x00000003          /* page aligned, memory information */
    .section .multiboot, "a"
    .align 4
    .long 0x1BADB002, FLAGS, -(0x1BADB002 + FLAGS)

    .text
    .globl _start
_start:
    cli
    mov $stack_top, %esp
    push %ebx                       /* multiboot information */
    push %eax                       /* multiboot magic */
    call guest_main
1:  hlt
    jmp 1b

    .globl timer_stub, other_stub
timer_stub:
    pusha
    incl ticks
    movb $0x20, %al
    outb %al, $0x20                 /* end of interrupt */
    popa
    iret
other_stub:                         /* spurious: tell both controllers that it ended */
    pusha
    movb $0x20, %al
    outb %al, $0xa0
    outb %al, $0x20
    popa
    iret

    .globl load_segments
load_segments:
    lgdt gdt_pointer
    ljmp $8, $1f
1:  mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov %ax, %fs
    mov %ax, %gs
    ret

    .align 8
gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word 23
    .long gdt

    .bss
    .align 16
    .space 8192
stack_top:
    .globl ticks
ticks:
    .long 0
