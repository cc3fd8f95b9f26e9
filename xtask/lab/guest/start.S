/*
 * Where the lab's guest starts, and the ELF notes that tell Xen how.
 *
 * 64-bit: one ELF for PV (pv_start) and PVH (pvh_start). 32-bit: PV only.
 * All memory is mapped with virtual = pseudo-physical address.
 */

        .macro NOTE type, value:vararg
        .pushsection .note.Xen, "a", @note
        .balign 4
        .long 4                                 /* "Xen" with its NUL */
        .long 9f - 8f
        .long \type
        .asciz "Xen"
8:      \value
9:      .balign 4
        .popsection
        .endm

#ifdef __x86_64__
#define WORD .quad
#else
#define WORD .long
#endif
        NOTE 1,  WORD pv_start                  /* ENTRY */
        NOTE 2,  WORD hypercall_page            /* HYPERCALL_PAGE */
        NOTE 3,  WORD 0                         /* VIRT_BASE */
        NOTE 4,  WORD 0                         /* PADDR_OFFSET */
        NOTE 5,  .asciz "xen-3.0"               /* XEN_VERSION */
        NOTE 6,  .asciz "xsr-lab"               /* GUEST_OS */
        NOTE 8,  .asciz "generic"               /* LOADER */
        NOTE 9,  .asciz "yes"                   /* PAE_MODE */
        NOTE 10, .asciz "!writable_page_tables|pae_pgdir_above_4gb"
        NOTE 14, .long 1                        /* SUSPEND_CANCEL */

        .text
        .globl pv_start, second_start, hypercall_page, boot_stack, second_stack

#ifdef __x86_64__
        NOTE 18, .long pvh_start                /* PHYS32_ENTRY */
        .globl pvh_start, second_flat           /* for bios.S */

pv_start:                                       /* rsi: start_info */
        cld
        movq    $boot_stack, %rsp
        movq    %rsi, %rdi
        call    guest_main
        ud2

        .macro LONG_MODE there
        movl    $table_top, %eax
        movl    %eax, %cr3
        movl    $0x20, %eax                     /* PAE */
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx               /* EFER: long mode */
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax               /* paging, protection */
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $8, $\there
        .endm

        .code32
pvh_start:                                      /* flat segments, no paging */
        cld
        /* 4 GiB of 2 MiB pages, one to one. */
        movl    $tables_2m, %edi
        movl    $0x83, %eax                     /* present, writable, 2 MiB */
1:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $0x200000, %eax
        jnc     1b
        movl    $tables_2m + 3, %eax
        movl    $table_1g, %edi
        movl    $4, %ecx
2:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $0x1000, %eax
        loop    2b
        movl    $table_1g + 3, table_top
        LONG_MODE 3f
        .code64
3:      movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movq    $boot_stack, %rsp
        xorl    %edi, %edi                      /* no start_info: PVH */
        call    guest_main
        ud2

        .code32
second_flat:                                    /* the second vcpu, when firmware starts it */
        LONG_MODE 4f
        .code64
4:      movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movq    $second_stack, %rsp
second_start:                                   /* the second vcpu; its rsp is set */
        cld
        call    second_main
        ud2

        .data
        .balign 8
gdt:    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word 23
        .long gdt

        .bss
        .balign 4096
        .globl table_top
table_top:      .skip 4096
table_1g:       .skip 4096
tables_2m:      .skip 4 * 4096
#else
pv_start:                                       /* esi: start_info */
        cld
        movl    $boot_stack, %esp
        pushl   %esi
        call    guest_main
        ud2

second_start:
        cld
        call    second_main
        ud2
#endif

        .section .hypercalls, "awx", @progbits
        .balign 4096
hypercall_page:                                 /* Xen fills it */
        .skip 4096

        .bss
        .balign 16
        .skip 8192
boot_stack:
        .skip 8192
second_stack:

        .section .note.GNU-stack, "", @progbits
