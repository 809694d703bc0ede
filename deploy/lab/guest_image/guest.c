/*
 * A guest that can prove what happened to it.
 *
 * It dirties memory at a set rate and sleeps in between, checks every page that it visits, checks all of its memory on
 * request, uses its devices and checks their answers, and sends heartbeats. README.md beside this file has the command
 * line, the lines on both serial ports and the device protocol; this file has the reasons.
 *
 * Everything happens in one loop that wakes with each timer tick. Nothing in it ever waits for somebody outside: what
 * a serial port does not take stays in a buffer, and a line for which there is no room is dropped whole.
 */

#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;

/* ---- the machine ------------------------------------------------------------------------------------------------ */

extern volatile u32 ticks; /* start.S: timer interrupts since boot */
extern char image_end[];   /* guest.ld */
void load_segments(void), timer_stub(void), spurious_stub(void);
void kmain(u32 magic, const u32 *info);

#define PIT_HZ 1193182u
#define PM1_CONTROL 0x604 /* where SeaBIOS puts it, on pc and q35 */
#define SLEEP_ENABLE 0x2000

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0,%1" ::"a"(value), "Nd"(port)); }

static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0,%1" ::"a"(value), "Nd"(port)); }

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1,%0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0,%1" ::"a"(value), "Nd"(port)); }

static inline u32 inl(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1,%0" : "=a"(value) : "Nd"(port));
    return value;
}

static struct gate {
    u16 low, selector;
    u8 zero, type;
    u16 high;
} __attribute__((packed)) idt[256];

static void set_gate(int vector, void (*stub)(void))
{
    u32 address = (u32)stub;
    idt[vector] = (struct gate){(u16)address, 8, 0, 0x8e, (u16)(address >> 16)};
}

static void start_timer(u32 hz)
{
    for (int vector = 0; vector < 256; vector++)
        set_gate(vector, spurious_stub);
    set_gate(0x20, timer_stub);
    struct {
        u16 limit;
        u32 base;
    } __attribute__((packed)) pointer = {sizeof idt - 1, (u32)idt};
    __asm__ volatile("lidt %0" ::"m"(pointer));

    /* Both PICs: vectors 0x20 and 0x28, only IRQ 0 let through. */
    outb(0x20, 0x11), outb(0xa0, 0x11);
    outb(0x21, 0x20), outb(0xa1, 0x28);
    outb(0x21, 4), outb(0xa1, 2);
    outb(0x21, 1), outb(0xa1, 1);
    outb(0x21, 0xfe), outb(0xa1, 0xff);

    u32 divisor = PIT_HZ / hz;
    outb(0x43, 0x34), outb(0x40, (u8)divisor), outb(0x40, (u8)(divisor >> 8));
}

/* ---- serial ports: polled, never waiting ------------------------------------------------------------------------ */

#define TX_SIZE 8192u /* a power of two; about 130 heartbeats, should the reader stand still for a while */
#define LSR_DATA_READY 0x01
#define LSR_MAY_SEND 0x20

struct port {
    u16 io;
    u32 head, tail; /* bytes ever queued and ever sent */
    char tx[TX_SIZE];
};

static struct port console, devices;

static void open_port(struct port *port, u16 io)
{
    port->io = io;
    outb(port->io + 1, 0);                                                  /* no interrupts */
    outb(port->io + 3, 0x80), outb(port->io, 1), outb(port->io + 1, 0);     /* 115200 baud */
    outb(port->io + 3, 0x03), outb(port->io + 4, 0x03);                     /* 8N1; DTR and RTS */
    outb(port->io + 2, 0xc7); /* FIFOs; trigger level 14, as QEMU hands over no more than that between two reads */
}

/* Send what the port takes now. QEMU takes a byte at once unless its peer is connected and does not read. */
static void drain(struct port *port)
{
    while (port->tail != port->head && (inb(port->io + 5) & LSR_MAY_SEND))
        outb(port->io, (u8)port->tx[port->tail++ % TX_SIZE]);
}

/* A received byte, or -1. */
static int receive(struct port *port) { return inb(port->io + 5) & LSR_DATA_READY ? inb(port->io) : -1; }

/* A line is built here and queued whole or not at all: whoever reads never sees a line torn by a full buffer. */
struct line {
    u32 length;
    char text[160];
};

static void add_char(struct line *line, char c)
{
    if (line->length < sizeof line->text - 1)
        line->text[line->length++] = c;
}

static void add_text(struct line *line, const char *text)
{
    while (*text)
        add_char(line, *text++);
}

static void add_hex(struct line *line, u32 value)
{
    for (int shift = 28; shift >= 0; shift -= 4)
        add_char(line, "0123456789abcdef"[(value >> shift) & 15]);
}

static void add_field(struct line *line, u32 value)
{
    add_char(line, ' ');
    add_hex(line, value);
}

static void end_line(struct port *port, struct line *line)
{
    line->text[line->length++] = '\n';
    if (TX_SIZE - (port->head - port->tail) < line->length)
        return;
    for (u32 i = 0; i < line->length; i++)
        port->tx[port->head++ % TX_SIZE] = line->text[i];
    drain(port);
}

/* ---- the command line ------------------------------------------------------------------------------------------- */

static struct {
    u32 base, pages, rate, hz, hb, fill, res, dev, devhz, seed, pci;
} config;

static const struct key {
    const char *name;
    u32 *value, standard, least, most;
} keys[] = {
    {"base", &config.base, 4, 2, 2048},
    {"pages", &config.pages, 1024, 1, 524288},
    {"rate", &config.rate, 16, 0, 1u << 20},
    {"hz", &config.hz, 100, 19, 1000},
    {"hb", &config.hb, 10, 1, 1u << 20},
    {"fill", &config.fill, 1, 0, 1},
    {"res", &config.res, 0, 0, 2048},
    {"dev", &config.dev, 0, 0, 8},
    {"devhz", &config.devhz, 10, 1, 1u << 20},
    {"seed", &config.seed, 0, 0, 0xffffffff},
    {"pci", &config.pci, 0, 0, 8},
};
#define KEYS (sizeof keys / sizeof keys[0])

/* Text after `name=` when `word` begins with that, else 0. */
static const char *after_name(const char *word, const char *name)
{
    while (*name)
        if (*word++ != *name++)
            return 0;
    return *word == '=' ? word + 1 : 0;
}

/* The first 32 bits of a uuid, as the seed; 0 when there are no eight hexadecimal digits. */
static int read_uuid(const char *digit)
{
    u32 value = 0;
    for (u32 n = 0; n < 8; n++, digit++) {
        char low = (char)(*digit | 0x20);
        if (*digit >= '0' && *digit <= '9')
            value = value << 4 | (u32)(*digit - '0');
        else if (low >= 'a' && low <= 'f')
            value = value << 4 | (u32)(low - 'a' + 10);
        else
            return 0;
    }
    config.seed = value;
    return 1;
}

/* Read one `key=decimal` word into the configuration; 0 when it is no such thing or out of range. */
static int read_word(const char *word, const struct key **key)
{
    const char *uuid = after_name(word, "uuid");
    if (uuid)
        return read_uuid(uuid);
    for (u32 k = 0; k < KEYS; k++) {
        const char *digit = after_name(word, keys[k].name);
        if (!digit)
            continue;
        *key = &keys[k];
        u32 value = 0, digits = 0;
        for (; *digit >= '0' && *digit <= '9'; digit++, digits++) {
            u32 next = (u32)(*digit - '0');
            if (value > (0xffffffffu - next) / 10)
                return 0;
            value = value * 10 + next;
        }
        *keys[k].value = value;
        return digits && (!*digit || *digit == ' ') && value >= keys[k].least && value <= keys[k].most;
    }
    return 0;
}

/* A guest with a wrong command line must not look like one that hangs: say it once a second, for whoever comes. */
static void refuse(const struct line *reason)
{
    start_timer(100);
    for (u32 spoken = 0, again = 0;;) {
        if (!spoken || ticks - again >= 100) {
            struct line line = *reason;
            end_line(&console, &line);
            spoken = 1, again = ticks;
        }
        drain(&console);
        __asm__ volatile("sti; hlt; cli" ::: "memory");
    }
}

static void read_command_line(const char *word)
{
    for (u32 k = 0; k < KEYS; k++)
        *keys[k].value = keys[k].standard;
    while (*word && *word != ' ')
        word++; /* the loader puts the image's name first */
    for (;;) {
        while (*word == ' ')
            word++;
        if (!*word)
            return;
        const struct key *key = 0;
        if (!read_word(word, &key)) {
            struct line line = {0};
            add_text(&line, "FATAL bad argument: ");
            for (u32 n = 0; word[n] && word[n] != ' ' && n < 40; n++)
                add_char(&line, word[n]);
            if (key) {
                add_text(&line, ", allowed (hex)");
                add_field(&line, key->least);
                add_text(&line, " to");
                add_field(&line, key->most);
            }
            refuse(&line);
        }
        while (*word && *word != ' ')
            word++;
    }
}

static void check_memory(const u32 *info)
{
    u32 first = config.base << 20, need_kib = config.pages * 4 + config.res * 1024;
    u32 have_kib = info[0] & 1 ? info[2] + 1024 : 0; /* the loader counts from 1 MiB on */
    if (first >= (u32)image_end && have_kib >= config.base * 1024 && need_kib <= have_kib - config.base * 1024)
        return;
    struct line line = {0};
    add_text(&line, "FATAL base, pages and res need (KiB, hex)");
    add_field(&line, config.base * 1024 + need_kib);
    add_text(&line, ", the machine has");
    add_field(&line, have_kib);
    refuse(&line);
}

/* ---- memory ----------------------------------------------------------------------------------------------------- */

/* The one mixing function, of pages and devices alike (README.md has it in Python). */
static u32 hash(u32 x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

/*
 * Each page says how often it was visited, which page it is and what the rest of it holds. A page that a migration
 * lost, left stale, put in the wrong place or damaged anywhere disagrees with one of the three.
 */
enum { COUNTER, TAG, CONTENT, FIRST_FREE, PAGE_WORDS = 1024 };

#define REPORTED_ERRORS 20u /* lines; the count in the heartbeat goes on */

static u32 total_pages;     /* visited pages, then those that only a full verify looks at */
static u32 cursor, sweeps;  /* next page to visit; whole rounds done */
static u32 page_errors, reported;

static volatile u32 *page_at(u32 page) { return (volatile u32 *)((config.base << 20) + (page << 12)); }

/* A sum that any change of any one word changes: the factor is odd, so each step can be undone. */
static u32 content_of(u32 page)
{
    const volatile u32 *words = page_at(page);
    u32 sum = words[TAG];
    for (u32 w = FIRST_FREE; w < PAGE_WORDS; w++)
        sum = (sum ^ words[w]) * 0x01000193u;
    return sum;
}

static void fill_memory(void)
{
    u32 noise = 2463534242u;
    for (u32 page = 0; page < total_pages; page++) {
        volatile u32 *words = page_at(page);
        words[COUNTER] = 0;
        words[TAG] = hash(page);
        for (u32 w = FIRST_FREE; config.fill && w < PAGE_WORDS; w++) {
            noise ^= noise << 13;
            noise ^= noise >> 17;
            noise ^= noise << 5;
            words[w] = noise;
        }
        words[CONTENT] = content_of(page);
    }
}

static void report_page(char what, u32 page, u32 got, u32 want)
{
    if (reported++ >= REPORTED_ERRORS)
        return;
    struct line line = {0};
    add_text(&line, "E ");
    add_char(&line, what);
    add_field(&line, page);
    add_field(&line, got);
    add_field(&line, want);
    end_line(&console, &line);
}

/* How often this page must have been visited by now. */
static u32 visits_of(u32 page)
{
    if (page >= config.pages)
        return 0;
    return page < cursor ? sweeps + 1 : sweeps;
}

/* Counter and tag; 0 when one of them is wrong. */
static int check_page(u32 page)
{
    volatile u32 *words = page_at(page);
    u32 counter = words[COUNTER], tag = words[TAG];
    if (counter != visits_of(page))
        report_page('c', page, counter, visits_of(page));
    else if (tag != hash(page))
        report_page('t', page, tag, hash(page));
    else
        return 1;
    return 0;
}

/* Check pages and dirty them. A page found wrong is set right, so that one loss counts once. */
static void visit(u32 pages)
{
    while (pages--) {
        volatile u32 *words = page_at(cursor);
        if (!check_page(cursor)) {
            page_errors++;
            words[TAG] = hash(cursor);
        }
        words[COUNTER] = visits_of(cursor) + 1;
        if (++cursor == config.pages)
            cursor = 0, sweeps++;
    }
}

/* ---- full verify: in slices, so that the heart goes on beating ---------------------------------------------------- */

#define VERIFY_SLICE 16u

static struct {
    u32 wanted; /* verifies asked for and not begun */
    u32 running, page, bad;
} verify;

static void verify_slice(void)
{
    if (!verify.running) {
        verify.wanted--;
        verify.running = 1, verify.page = 0, verify.bad = 0;
        reported = 0;
    }
    for (u32 n = 0; n < VERIFY_SLICE && verify.page < total_pages; n++, verify.page++) {
        if (!check_page(verify.page)) {
            verify.bad++;
            continue;
        }
        u32 content = content_of(verify.page), want = page_at(verify.page)[CONTENT];
        if (content != want) {
            report_page('h', verify.page, content, want);
            verify.bad++;
        }
    }
    if (verify.page < total_pages)
        return;
    verify.running = 0;
    struct line line = {0};
    add_text(&line, verify.bad ? "V bad" : "V ok");
    add_field(&line, verify.bad ? verify.bad : total_pages);
    end_line(&console, &line);
}

/* ---- devices ---------------------------------------------------------------------------------------------------- */

#define DEVICES 16u
#define FIRST_PCI 8u /* devices below this are rung over the second port */
#define DEVICE_TX_ROOM 1024u /* unsent doorbells beyond this only make duplicates: the peer does not read */

static struct device {
    u32 state;       /* what the device's state must be after doorbell `n` */
    u32 n;           /* last doorbell rung; 0 = none */
    u32 outstanding; /* `n` is not answered yet */
    u32 rung_at;     /* tick of the last ring or re-ring of `n` */
    u32 again;       /* re-rings of `n`: that many duplicate answers are no error */
    u32 spare_n, spare_answer, spare; /* duplicates that may still come, for the doorbell before */
    volatile u32 *bar; /* of a PCI device */
} device[DEVICES];

static u32 device_rings, device_errors, device_retries, device_reported;
static struct line answer; /* received so far */

static void reset_devices(void)
{
    for (u32 d = 0; d < DEVICES; d++)
        device[d].state = hash((0xd0000000u + d) ^ config.seed);
}

/* ---- PCI devices: doorbells in a BAR. Firmware has given it an address, a migration keeps that. */

#define PCI_ID 0xd07e1234u
enum { BAR_MAGIC, BAR_INDEX, BAR_RING, BAR_ANSWERED, BAR_ANSWER }; /* words of the BAR */

static u32 pci_address(u32 slot, u32 offset) { return 0x80000000u | slot << 11 | offset; }

static u32 pci_read(u32 slot, u32 offset)
{
    outl(0xcf8, pci_address(slot, offset));
    return inl(0xcfc);
}

static void find_pci_devices(void)
{
    u32 found = 0;
    for (u32 slot = 0; slot < 32; slot++) {
        if (pci_read(slot, 0) != PCI_ID)
            continue;
        outl(0xcf8, pci_address(slot, 4));
        outl(0xcfc, inl(0xcfc) | 2); /* let it answer to memory accesses */
        volatile u32 *bar = (volatile u32 *)(pci_read(slot, 0x10) & ~15u);
        u32 d = bar ? bar[BAR_INDEX] : 0;
        if (bar && bar[BAR_MAGIC] == 0x44524f56u && d >= FIRST_PCI && d < DEVICES && !device[d].bar)
            device[d].bar = bar, found++;
    }
    if (found == config.pci)
        return;
    struct line line = {0};
    add_text(&line, "FATAL pci devices (hex): wanted");
    add_field(&line, config.pci);
    add_text(&line, ", found");
    add_field(&line, found);
    refuse(&line);
}

static int is_there(u32 d) { return d < FIRST_PCI ? d < config.dev : !!device[d].bar; }

static void send_ring(u32 d, u32 now)
{
    device[d].rung_at = now;
    if (device[d].bar) {
        device[d].bar[BAR_RING] = device[d].n;
        return;
    }
    if (devices.head - devices.tail > DEVICE_TX_ROOM)
        return;
    struct line line = {0};
    add_text(&line, "R ");
    add_char(&line, (char)('0' + d));
    add_field(&line, device[d].n);
    end_line(&devices, &line);
}

/* One doorbell outstanding per device; one that stays unanswered for 2 s of the guest's time is rung again. */
static void ring_devices(u32 now)
{
    for (u32 d = 0; d < DEVICES; d++) {
        struct device *dev = &device[d];
        if (!is_there(d))
            continue;
        if (dev->outstanding) {
            if (now - dev->rung_at >= 2 * config.hz) {
                device_retries++, dev->again++;
                send_ring(d, now);
            }
        } else if ((now + d) % config.devhz == 0) {
            dev->n++;
            dev->outstanding = 1, dev->again = 0;
            send_ring(d, now);
        }
    }
}

static void device_error(u32 d, u32 n, u32 got, u32 want)
{
    device_errors++;
    if (device_reported++ >= REPORTED_ERRORS)
        return;
    struct line line = {0};
    add_text(&line, "D ");
    add_char(&line, "0123456789abcdef"[d]);
    add_field(&line, n);
    add_field(&line, got);
    add_field(&line, want);
    end_line(&console, &line);
}

/*
 * An answer is right when it is what the device's whole history gives. After a wrong one the guest takes over the
 * device's word: one loss of state counts once, a device that keeps losing state counts each time. An answer that
 * nobody waits for means that a second device speaks, unless it is the duplicate that a re-ring brought about.
 */
static void take_answer(u32 d, u32 n, u32 got)
{
    struct device *dev = &device[d];
    if (!dev->outstanding || n != dev->n) {
        if (dev->spare && n == dev->spare_n && got == dev->spare_answer)
            dev->spare--;
        else
            device_error(d, n, got, dev->state);
        return;
    }
    u32 want = hash(dev->state ^ n);
    device_rings++;
    if (got != want)
        device_error(d, n, got, want);
    dev->state = got;
    dev->outstanding = 0;
    dev->spare_n = n, dev->spare_answer = got, dev->spare = dev->again;
}

/* Take a hexadecimal number (lower case, at most 8 digits) from `*text`; 0 when there is none. */
static int take_hex(const char **text, u32 *value)
{
    u32 digits = 0;
    for (*value = 0; digits < 8; digits++, (*text)++) {
        char c = **text;
        if (c >= '0' && c <= '9')
            *value = *value << 4 | (u32)(c - '0');
        else if (c >= 'a' && c <= 'f')
            *value = *value << 4 | (u32)(c - 'a' + 10);
        else
            break;
    }
    return digits > 0;
}

static void parse_answer(const char *text)
{
    u32 d, n, got;
    if (*text++ != 'A' || *text++ != ' ' || !take_hex(&text, &d) || *text++ != ' ' || !take_hex(&text, &n) ||
        *text++ != ' ' || !take_hex(&text, &got) || *text || d >= config.dev)
        return; /* torn by a lost connection: the doorbell will be rung again */
    take_answer(d, n, got);
}

/* A PCI device answers in its registers, most often within the write that rang it. */
static void read_pci_devices(void)
{
    for (u32 d = FIRST_PCI; d < DEVICES; d++)
        if (device[d].bar && device[d].outstanding && device[d].bar[BAR_ANSWERED] == device[d].n)
            take_answer(d, device[d].n, device[d].bar[BAR_ANSWER]);
}

static void read_devices(void)
{
    int c;
    read_pci_devices();
    for (u32 budget = 512; budget && (c = receive(&devices)) >= 0; budget--) {
        if (c == 'A')
            answer.length = 0; /* a line begins, even if the end of the one before was lost on the way */
        if (c != '\n') {
            add_char(&answer, (char)c);
            continue;
        }
        answer.text[answer.length] = 0;
        parse_answer(answer.text);
        answer.length = 0;
    }
}

/* ---- the loop --------------------------------------------------------------------------------------------------- */

static void read_console(void)
{
    int c;
    for (u32 budget = 64; budget && (c = receive(&console)) >= 0; budget--) {
        if (c == 'v' && verify.wanted < 8)
            verify.wanted++;
        else if (c == '+')
            config.rate = !config.rate ? 1 : config.rate < 1u << 20 ? config.rate * 2 : config.rate;
        else if (c == '-')
            config.rate /= 2;
        else if (c == '0')
            config.rate = 0;
        else if (c == 'p')
            outw(PM1_CONTROL, SLEEP_ENABLE); /* sleep type 0: soft off */
    }
}

static void send_boot(void)
{
    struct line line = {0};
    add_text(&line, "BOOT");
    for (u32 k = 0; k < KEYS; k++) {
        add_char(&line, ' ');
        add_text(&line, keys[k].name);
        add_char(&line, '=');
        add_hex(&line, *keys[k].value);
    }
    end_line(&console, &line);
}

static void send_beat(u32 beat)
{
    struct line line = {0};
    add_char(&line, 'H');
    add_field(&line, beat);
    add_field(&line, sweeps);
    add_field(&line, page_errors);
    add_field(&line, device_rings);
    add_field(&line, device_errors);
    add_field(&line, device_retries);
    end_line(&console, &line);
}

void kmain(u32 magic, const u32 *info)
{
    open_port(&console, 0x3f8); /* COM1 */
    open_port(&devices, 0x2f8); /* COM2 */
    load_segments();
    read_command_line(magic == 0x2badb002 && info[0] & 4 ? (const char *)info[4] : "");
    check_memory(info);
    total_pages = config.pages + config.res * 256;
    fill_memory();
    reset_devices();
    find_pci_devices();
    send_boot();

    start_timer(config.hz);
    u32 done = ticks, beat = 0;
    for (;;) {
        if (verify.running || verify.wanted) {
            verify_slice();
            __asm__ volatile("sti; nop; cli" ::: "memory"); /* take a tick that came meanwhile */
        } else {
            __asm__ volatile("sti; hlt; cli" ::: "memory");
        }
        while (done != ticks) {
            done++;
            if (done % config.hb == 0)
                send_beat(++beat); /* before the work of this tick, so that the work does not delay it */
            visit(config.rate);
            ring_devices(done);
        }
        drain(&console);
        drain(&devices);
        read_console();
        read_devices();
    }
}
