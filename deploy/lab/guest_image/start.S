/* Entry of the guest image: multiboot header, 32-bit start, interrupt stubs, flat segments. See README.md. */
    .set FLAGS, 0x00000003              /* page-aligned modules, memory size wanted */
    .section .multiboot, "a"
    .align 4
    .long 0x1BADB002, FLAGS, -(0x1BADB002 + FLAGS)

    .text
    .globl _start
_start:
    cli
    cld
    mov $stack_top, %esp
    push %ebx                           /* multiboot information */
    push %eax                           /* multiboot magic */
    call kmain
1:  hlt
    jmp 1b

    .globl timer_stub
timer_stub:                             /* IRQ 0: count the tick, end of interrupt to the first PIC */
    pusha
    incl ticks
    movb $0x20, %al
    outb %al, $0x20
    popa
    iret

    .globl spurious_stub
spurious_stub:                          /* anything else: end of interrupt to both PICs */
    pusha
    movb $0x20, %al
    outb %al, $0xa0
    outb %al, $0x20
    popa
    iret

    .globl load_segments
load_segments:                          /* our own GDT: the loader's may be anywhere in the memory that we fill */
    lgdt gdt_pointer
    ljmp $8, $1f
1:  mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov %ax, %fs
    mov %ax, %gs
    ret

    .section .rodata
    .align 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
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

    .section .note.GNU-stack, "", @progbits
