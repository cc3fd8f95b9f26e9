/*
 * The lab's guest as the firmware of an HVM guest: 64 KiB at 0xf0000, where hvmloader puts
 * what xl has as its BIOS and starts it as a processor starts, in real mode at f000:fff0.
 * It copies the 64-bit guest to where it is linked and starts it as Xen starts a PVH guest.
 * But for how its second vcpu starts (here, too: at f000:0000), that sees no difference; libxl
 * does, for there is a device model.
 *
 * Linked with the symbols of the guest (--just-symbols), assembled with PAYLOAD defined as
 * the file of its bytes.
 */
        .text
        .globl _start
        .code16
_start: cli                                     /* at offset 0 */
        cld
        lgdtl   %cs:gdt_pointer - _start
        movl    %cr0, %eax
        orl     $1, %eax                        /* protection */
        movl    %eax, %cr0
        ljmpl   $8, $flat
        .code32
flat:   movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $1, %eax
        cpuid
        shrl    $24, %ebx                       /* APIC ID */
        movl    $second_flat, %eax
        jnz     1f                              /* not the first: all is there already */
        movl    $payload, %esi
        movl    $0x100000, %edi                 /* as in guest.lds */
        movl    $(payload_end - payload), %ecx
        rep movsb
        movl    $bss_begin, %edi
        movl    $bss_end, %ecx
        subl    %edi, %ecx
        xorl    %eax, %eax
        rep stosb
        movl    $pvh_start, %eax
1:      jmp     *%eax

        .balign 8
gdt:    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word 23
        .long gdt

        .balign 16
payload:
        .incbin PAYLOAD
payload_end:
        .org 0xfff0
        .code16
        ljmp    $0xf000, $0
        .org 0x10000

        .section .note.GNU-stack, "", @progbits
