/*
 * The lab's guest: small, and quick to notice when its memory is not what it was.
 *
 * It starts as a PV guest (64- or 32-bit), as a PVH guest or, the same, as the firmware
 * of an HVM guest (bios.S), with one or two vcpus and 4 MiB or more. It has no interrupts and no drivers: it polls. Each
 * round it
 *   - checks PATTERN_PAGES pages that never change,
 *   - checks WORK_PAGES pages of which every round rewrites one, so that a page
 *     which arrives in an old version (a dirty page that was missed) shows,
 *   - prints one line on the PV console,
 *   - looks for a request in control/shutdown of xenstore, and suspends or stops.
 * The second vcpu counts, and checks pages of its own.
 *
 * A guest without PV page tables whose name is "balloon" or "balloonhvm" also gives pages back to
 * Xen and takes them again: see breathe().
 *
 * The lines (the lab's scripts wait for them):
 *   guest: up KIND vcpus N
 *   guest: round N ok second M
 *   guest: round N BAD WHAT PAGE
 *   guest: resumed | guest: cancelled
 *   guest: wallclock N     (when Xen started, in seconds, as this guest is told)
 *
 * Interfaces: xen/include/public/{xen,sched,vcpu,event_channel,memory}.h,
 * io/{console,xs_wire}.h, hvm/{params,hvm_vcpu}.h.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long word;                     /* 4 bytes in a 32-bit guest */

#define PAGE_SIZE 4096
#define PAGE_ALIGNED __attribute__((aligned(PAGE_SIZE)))
#define WORDS_PER_PAGE (PAGE_SIZE / sizeof(word))
#define barrier() __asm__ volatile("" ::: "memory")

enum {
    PATTERN_PAGES = 128,
    WORK_PAGES = 64,
    BALLOON_PAGES = 32,
    BALLOON_STEP = 4,                           /* pages that move in a round */
    DOMID_SELF = 0x7ff0,
};

/* ---- what Xen gives -------------------------------------------------------- */

struct start_info {
    char magic[32];
    word nr_pages;
    word shared_info;                           /* machine address */
    u32 flags;
    word store_mfn;
    u32 store_port;
    word console_mfn;
    u32 console_port;
    word pt_base;                               /* virtual address, as is */
    word nr_pt_frames;
    word mfn_list;                              /* this: the p2m */
};

struct time_info {
    u32 version, pad;
    u64 tsc, system_nsec;
    u32 mul;
    signed char shift;
    u8 flags, pad2[2];
} __attribute__((packed, aligned(4)));

struct vcpu_info {
    u8 upcall_pending, upcall_mask;
    word pending_sel;
#ifdef __x86_64__
    word arch[2];                               /* cr2 and padding */
#else
    word arch[6];
#endif
    struct time_info time;
};

struct shared_info {
    struct vcpu_info vcpu[32];
    word pending[8 * sizeof(word)];
    word mask[8 * sizeof(word)];
    u32 wallclock[3];
#ifdef __x86_64__
    u32 wallclock_hi;
#endif
    word max_pfn;
    word p2m_top;                               /* pfn_to_mfn_frame_list_list */
};

struct store_ring {
    u8 request[1024], response[1024];
    volatile u32 request_cons, request_prod, response_cons, response_prod;
};

struct console_ring {
    u8 in[1024], out[2048];
    volatile u32 in_cons, in_prod, out_cons, out_prod;
};

/* ---- state ----------------------------------------------------------------- */

static PAGE_ALIGNED u8 shared_page[PAGE_SIZE];      /* Xen's page goes over it */
#define shared (*(volatile struct shared_info *)shared_page)
static PAGE_ALIGNED word p2m_leaves[WORDS_PER_PAGE];
static PAGE_ALIGNED word p2m_top[WORDS_PER_PAGE];
static PAGE_ALIGNED word pattern[PATTERN_PAGES][WORDS_PER_PAGE];
static PAGE_ALIGNED volatile word work[WORK_PAGES][WORDS_PER_PAGE];
static PAGE_ALIGNED volatile word second_work[8][WORDS_PER_PAGE];
static PAGE_ALIGNED volatile word balloon[BALLOON_PAGES][WORDS_PER_PAGE];
/* For each of them the round in which it was taken; 0: it is with Xen. */
static word balloon_taken[BALLOON_PAGES];
static int balloons;

static int pv, vcpus = 1;
static struct start_info *si;
static struct store_ring *store;
static struct console_ring *console;
static u32 store_port, console_port;

static volatile word second_rounds, second_bad;
static volatile int park, parked;               /* the second vcpu keeps still */

extern char hypercall_page[], second_start[], second_stack[];

/* ---- hypercalls ------------------------------------------------------------ */

enum { MEMORY_OP = 12, UPDATE_VA_MAPPING = 14, VCPU_OP = 24, SCHED_OP = 29, EVTCHN_OP = 32, HVM_OP = 34 };

static long hypercall(u32 number, word a, word b, word c, word d)
{
    const char *entry = hypercall_page + number * 32;
    long result;
#ifdef __x86_64__
    register word r10 __asm__("r10") = d;
    __asm__ volatile("call *%[entry]"
                     : "=a"(result), "+D"(a), "+S"(b), "+d"(c), "+r"(r10)
                     : [entry] "0"(entry)
                     : "rcx", "r8", "r9", "r11", "memory");
#else
    __asm__ volatile("call *%[entry]"
                     : "=a"(result), "+b"(a), "+c"(b), "+d"(c), "+S"(d)
                     : [entry] "0"(entry)
                     : "edi", "memory");
#endif
    return result;
}

/* Map a machine frame (0: nothing) at a page of ours. */
static void map(volatile void *at, u64 entry)
{
#ifdef __x86_64__
    hypercall(UPDATE_VA_MAPPING, (word)at, entry, 2, 0);
#else
    hypercall(UPDATE_VA_MAPPING, (word)at, (word)entry, (word)(entry >> 32), 2);
#endif
}

static void notify(u32 port)
{
    hypercall(EVTCHN_OP, 4, (word)&port, 0, 0);
}

struct hvm_param { u16 domid, pad; u32 index; u64 value; };

static u64 hvm_param(u32 index)
{
    struct hvm_param p = { DOMID_SELF, 0, index, 0 };
    hypercall(HVM_OP, 1, (word)&p, 0, 0);
    return p.value;
}

static void set_hvm_param(u32 index, u64 value)
{
    struct hvm_param p = { DOMID_SELF, 0, index, value };
    hypercall(HVM_OP, 0, (word)&p, 0, 0);
}

/* ---- memory ---------------------------------------------------------------- */

#ifdef __x86_64__
#define M2P ((volatile word *)0xffff800000000000ull)
#else
#define M2P ((volatile word *)0xf5800000u)
#endif

static word *p2m(void) { return (word *)si->mfn_list; }
static word mfn_of(const volatile void *page) { return p2m()[(word)page / PAGE_SIZE]; }
static void *page_of(word mfn) { return (void *)(M2P[mfn] * PAGE_SIZE); }

/* Find all that may have moved: after the start, and after a restore. */
static void attach(void)
{
    if (!pv) {
        struct { u16 domid, size; u32 space; u64 index, gfn; } place =
            { DOMID_SELF, 0, 0, 0, (word)shared_page / PAGE_SIZE };
        hypercall(MEMORY_OP, 7, (word)&place, 0, 0);
        /* A callback vector: how libxl tells that this guest suspends by itself. */
        set_hvm_param(0, 2ull << 56 | 0xf3);
        store = (void *)(word)(hvm_param(1) * PAGE_SIZE);
        store_port = hvm_param(2);
        console = (void *)(word)(hvm_param(17) * PAGE_SIZE);
        console_port = hvm_param(18);
        return;
    }
    map(shared_page, (u64)si->shared_info | 7);     /* present, writable, user */
    word leaves = (si->nr_pages + WORDS_PER_PAGE - 1) / WORDS_PER_PAGE;
    for (word i = 0; i < leaves; i++)
        p2m_leaves[i] = mfn_of(p2m() + i * WORDS_PER_PAGE);
    p2m_top[0] = mfn_of(p2m_leaves);
    shared.max_pfn = si->nr_pages;
    shared.p2m_top = mfn_of(p2m_top);
    store = page_of(si->store_mfn);
    store_port = si->store_port;
    console = page_of(si->console_mfn);
    console_port = si->console_port;
}

/* ---- time ------------------------------------------------------------------ */

static u64 tsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

static u64 now_nsec(int vcpu)
{
    volatile struct time_info *t = &shared.vcpu[vcpu].time;
    u32 version;
    u64 nsec;
    do {
        version = t->version;
        barrier();
        u64 ticks = tsc() - t->tsc;
        ticks = t->shift < 0 ? ticks >> -t->shift : ticks << t->shift;
        /* ticks * mul / 2^32, without 128 bits */
        nsec = t->system_nsec + (ticks >> 32) * t->mul + ((ticks & 0xffffffff) * t->mul >> 32);
        barrier();
    } while (version & 1 || version != t->version);
    return nsec;
}

/* Until an event or for so long. */
static void poll(int vcpu, u32 *port, u32 nsec)
{
    struct { word ports; u32 count; u64 until; } p =
        { (word)port, port ? 1 : 0, now_nsec(vcpu) + nsec };
    hypercall(SCHED_OP, 3, (word)&p, 0, 0);
    if (port)
        __atomic_and_fetch(&shared.pending[*port / (8 * sizeof(word))],
                           ~((word)1 << *port % (8 * sizeof(word))), __ATOMIC_SEQ_CST);
}

/* ---- console --------------------------------------------------------------- */

static void put(const char *text)
{
    for (; *text; text++) {
        while (console->out_prod - console->out_cons >= sizeof console->out) {
            notify(console_port);
            poll(0, &console_port, 10000000);
        }
        console->out[console->out_prod % sizeof console->out] = *text;
        barrier();
        console->out_prod++;
    }
    notify(console_port);
}

static void put_number(word n)
{
    char digits[24], *p = digits + sizeof digits - 1;
    *p = 0;
    do
        *--p = '0' + n % 10;
    while (n /= 10);
    put(p);
}

static void put_wallclock(void)
{
    put("guest: wallclock ");
    put_number(shared.wallclock[1]);            /* after its version */
    put("\n");
}

/* ---- xenstore: one request at a time ---------------------------------------- */

static void store_send(const void *bytes, u32 count)
{
    for (const u8 *p = bytes; count; count--, p++) {
        while (store->request_prod - store->request_cons >= sizeof store->request)
            poll(0, &store_port, 10000000);
        store->request[store->request_prod % sizeof store->request] = *p;
        barrier();
        store->request_prod++;
    }
}

static u8 store_byte(void)
{
    while (store->response_cons == store->response_prod)
        poll(0, &store_port, 50000000);
    barrier();
    u8 byte = store->response[store->response_cons % sizeof store->response];
    barrier();
    store->response_cons++;
    return byte;
}

/* The type of the answer; as much of its body as has room, with a NUL behind. */
static u32 store_ask(u32 type, const char *body, u32 length, char *answer, u32 room)
{
    u32 header[4] = { type, 0, 0, length };
    store_send(header, sizeof header);
    store_send(body, length);
    notify(store_port);
    for (u32 i = 0; i < sizeof header; i++)
        ((u8 *)header)[i] = store_byte();
    u32 kept = 0;
    for (u32 i = 0; i < header[3]; i++) {
        char byte = store_byte();
        if (kept + 1 < room)
            answer[kept++] = byte;
    }
    answer[kept] = 0;
    notify(store_port);
    return header[0];
}

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* ---- the second vcpu -------------------------------------------------------- */

void second_main(void)
{
    for (;;) {
        if (park) {
            parked = 1;
            while (park)
                hypercall(SCHED_OP, 0, 0, 0, 0); /* yield */
            parked = 0;
        }
        word round = second_rounds;
        for (word page = 0; page < 8; page++)
            for (word i = 0; i < WORDS_PER_PAGE; i += 64) {
                if (second_work[page][i] != round)
                    second_bad++;
                second_work[page][i] = round + 1;
            }
        second_rounds = round + 1;
        poll(1, 0, 50000000);
    }
}

#ifdef __x86_64__
/* As firmware does, by its local APIC: it starts at f000:0000, in bios.S. */
static void wake_second(void)
{
    volatile u32 *apic = (void *)0xfee00000ul;
    apic[0x310 / 4] = 2 << 24;                  /* to its APIC ID */
    apic[0x300 / 4] = 0x4500;                   /* INIT */
    poll(0, 0, 50000000);
    apic[0x310 / 4] = 2 << 24;
    apic[0x300 / 4] = 0x46f0;                   /* start at page 0xf0 */
    for (int tries = 0; tries < 200 && !second_rounds; tries++)
        poll(0, 0, 50000000);
    if (second_rounds)
        vcpus = 2;
}
#endif

static void start_second(void)
{
#ifdef __x86_64__
    /* struct vcpu_hvm_context, 64-bit mode; struct vcpu_guest_context. */
    static u64 hvm[1 + 14] __attribute__((aligned(16)));
    static u64 context[0x1430 / 8] __attribute__((aligned(16)));
    long result;
    if (pv) {
        u64 *regs = context + 65;               /* behind the FPU and the flags */
        context[64] = 1 << 2;                   /* VGCF_in_kernel */
        regs[16] = (u64)second_start;           /* rip */
        regs[17] = 0xe033;                      /* cs: flat, 64-bit */
        regs[18] = 0;                           /* rflags */
        regs[19] = (u64)second_stack;           /* rsp */
        regs[20] = 0xe02b;                      /* ss: flat */
        u64 *tail = regs + 25 + 512 + 2 + 16 + 1;
        tail[0] = 0xe02b;                       /* kernel_ss */
        tail[1] = (u64)second_stack;            /* kernel_sp */
        tail[2 + 3] = (u64)mfn_of((void *)si->pt_base) << 12; /* cr3 */
        result = hypercall(VCPU_OP, 0, 1, (word)context, 0);
    } else {
        u64 *regs = hvm + 1, cr0, cr3, cr4;
        u32 low, high;
        __asm__("mov %%cr0, %0" : "=r"(cr0));
        __asm__("mov %%cr3, %0" : "=r"(cr3));
        __asm__("mov %%cr4, %0" : "=r"(cr4));
        __asm__("rdmsr" : "=a"(low), "=d"(high) : "c"(0xc0000080));
        hvm[0] = 1;                             /* VCPU_HVM_MODE_64B */
        regs[4] = (u64)second_stack;            /* rsp */
        regs[8] = (u64)second_start;            /* rip */
        regs[9] = 2;                            /* rflags */
        regs[10] = cr0;
        regs[11] = cr3;
        regs[12] = cr4;
        regs[13] = low;                         /* efer */
        result = hypercall(VCPU_OP, 0, 1, (word)hvm, 0);
        if (result == -17) {                    /* EEXIST: hvmloader had it up, and halted it */
            wake_second();
            return;
        }
    }
#else
    /* struct vcpu_guest_context of a 32-bit guest. */
    static u32 context[0xaf0 / 4] __attribute__((aligned(16)));
    word frame = mfn_of((void *)si->pt_base);
    u32 *regs = context + 129;                  /* behind the FPU and the flags */
    context[128] = 1 << 2;                      /* VGCF_in_kernel */
    regs[8] = (u32)second_start;                /* eip */
    regs[9] = 0xe019;                           /* cs: flat, ring 1 */
    regs[11] = (u32)second_stack;               /* esp */
    for (int i = 12; i < 15; i++)
        regs[i] = 0xe021;                       /* ss, es, ds: flat, ring 1 */
    u32 *tail = regs + 17 + 512 + 2 + 16 + 1;
    tail[0] = 0xe021;                           /* kernel_ss */
    tail[1] = (u32)second_stack;                /* kernel_sp */
    tail[2 + 3] = frame << 12 | frame >> 20;    /* cr3 of a guest with PAE */
    long result = hypercall(VCPU_OP, 0, 1, (word)context, 0);
#endif
    if (result == 0 && hypercall(VCPU_OP, 1, 1, 0, 0) == 0)
        vcpus = 2;
}

/* ---- memory given back and taken again ---------------------------------------- */

static word pattern_at(word page, word i) { return (page << 16 | i) * 2654435761u + 1; }

struct reservation { word frames, count; u32 order, flags; u16 domid; };

/* 1: give the frame of page number `page` back; 6: take one for it. What Xen did: 1, or not. */
static long reserve(u32 operation, word page)
{
    word frame = (word)balloon[page] / PAGE_SIZE;
    struct reservation r = { (word)&frame, 1, 0, 0, DOMID_SELF };
    return hypercall(MEMORY_OP, operation, (word)&r, 0, 0);
}

/* BALLOON_STEP pages in turn: one that is with Xen is taken and written, once; one that is here
 * is given back. So each is away for as many rounds as it is here. */
static void breathe(word round)
{
    for (word n = 0; n < BALLOON_STEP; n++) {
        word page = (round * BALLOON_STEP + n) % BALLOON_PAGES;
        if (balloon_taken[page]) {
            balloon_taken[page] = 0;
            if (reserve(1, page) != 1)
                put(" BAD give ");
            continue;
        }
        if (reserve(6, page) != 1) {
            put(" BAD take ");
            continue;
        }
        for (word i = 0; i < WORDS_PER_PAGE; i++)
            balloon[page][i] = pattern_at(round + page, i);
        balloon_taken[page] = round;
    }
}

/* ---- suspend ---------------------------------------------------------------- */

static void stop(u32 reason)
{
    if (vcpus == 2) {
        park = 1;
        while (!parked)
            hypercall(SCHED_OP, 0, 0, 0, 0);
    }
    if (pv) {
        /* An image names pfns, and its page tables no frame of Xen's. */
        si->store_mfn = M2P[si->store_mfn];
        si->console_mfn = M2P[si->console_mfn];
        map(shared_page, 0);
    }
    long cancelled = hypercall(SCHED_OP, 2, (word)&reason, pv ? mfn_of(si) : 0, 0);
    if (pv && cancelled) {
        si->store_mfn = p2m()[si->store_mfn];
        si->console_mfn = p2m()[si->console_mfn];
    }
    attach();
    park = 0;
    put(cancelled ? "guest: cancelled\n" : "guest: resumed\n");
    put_wallclock();
}

/* ---- rounds ----------------------------------------------------------------- */

static void check(word round)
{
    for (word page = 0; page < PATTERN_PAGES; page++)
        for (word i = 0; i < WORDS_PER_PAGE; i++)
            if (pattern[page][i] != pattern_at(page, i)) {
                put(" BAD pattern ");
                put_number(page);
                return;
            }
    for (word page = 0; page < WORK_PAGES; page++) {
        /* The last round up to this one that wrote the page; 0: none yet. */
        word back = (round - page) % WORK_PAGES, wrote = back >= round ? 0 : round - back;
        for (word i = 0; i < WORDS_PER_PAGE; i++)
            if (work[page][i] != (wrote ? pattern_at(wrote, i) : 0)) {
                put(" BAD work ");
                put_number(page);
                return;
            }
    }
    put(second_bad ? " BAD second " : " ok second ");
    put_number(second_rounds);
}

void guest_main(struct start_info *info)
{
    static const char key[] = "control/shutdown";
    static const char name[] = "name";
    static char value[32];

    si = info;
    pv = info != 0;
#ifdef __x86_64__
    if (!pv) {
        /* Have Xen fill the hypercall page. */
        u32 base = 0x40000000, a, b, c, d;
        do {
            __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(base));
            if (b == 0x566e6558 && c == 0x65584d4d && d == 0x4d4d566e) /* XenVMMXenVMM */
                break;
            base += 0x100;
        } while (base < 0x40010000);
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(base + 2));
        __asm__ volatile("wrmsr" :: "c"(b), "a"((u32)(word)hypercall_page), "d"(0) : "memory");
    }
#endif
    attach();
    for (word page = 0; page < PATTERN_PAGES; page++)
        for (word i = 0; i < WORDS_PER_PAGE; i++)
            pattern[page][i] = pattern_at(page, i);
    start_second();
    put("guest: up ");
    put(!pv ? "pvh" : sizeof(word) == 8 ? "pv" : "pv32");
    put(" vcpus ");
    put_number(vcpus);
    put("\n");
    put_wallclock();
    if (!pv && store_ask(2, name, sizeof name, value, sizeof value) == 2)
        balloons = same(value, "balloon") || same(value, "balloonhvm");
    for (word page = 0; balloons && page < BALLOON_PAGES; page++)
        if (reserve(1, page) != 1)
            put("guest: BAD give\n");

    for (word round = 0;;) {
        round++;
        for (word i = 0; i < WORDS_PER_PAGE; i++)
            work[round % WORK_PAGES][i] = pattern_at(round, i);
        put("guest: round ");
        put_number(round);
        if (balloons)
            breathe(round);
        check(round);
        put("\n");
        if (store_ask(2, key, sizeof key, value, sizeof value) == 2 && value[0]) {
            u32 reason = same(value, "suspend") ? 2 : 0;
            store_ask(11, key, sizeof key, value, sizeof value); /* empty: seen */
            stop(reason);
        }
        poll(0, &store_port, 200000000);
    }
}
