/* PID 1 of the Linux test guest, and all that runs in it: it proves that disks, memory and network came along.
 *
 * disks    a ring of 4 KiB records on each of them, one write (O_DIRECT) and one fdatasync per record and disk. A record is
 *          promised once fdatasync has returned on every disk, and never before. Beside it, at a rate of its own, blocks
 *          of 64 KiB are written in a random order (the write load), each 4 KiB of them tagged.
 * memory   pages with a counter and a pattern, visited in turn.
 * network  an echo server for TCP and UDP on port 7; port 8 takes the same letters as the console.
 * console  heartbeats and answers in the words of the small guest image (deploy/lab/guest_image/README.md); README.md here says
 *          what the numbers mean.
 *
 * The kernel's command line has what is to be done: probe.KEY=VALUE. README.md has the keys. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t u64;
typedef uint32_t u32;

enum {
    PAGE = 4096,
    WORDS = PAGE / 8,
    SLOTS = 1024,               /* records in a ring */
    RING_AT = 1 << 20,          /* first byte of the ring on a disk */
    LOAD_AT = 8 << 20,          /* first byte of the blocks of the write load */
    BLOCK = 65536,
    PIECES = BLOCK / PAGE,
    MAX_DISKS = 4,
    MAX_TOLD = 20,              /* complaints of each kind */
    TTY_ROOM = 3500,            /* of the 4096 bytes that the kernel's driver holds */
    ECHO_PORT = 7,
    CONTROL_PORT = 8,
};
#define MAGIC 0x3150524556524f44ull

struct options {
    char disks[64];
    u32 records_per_s, load_kib_per_s, load_mib, mem_mib, pages_per_s, heartbeat_hz;
    u32 address, seed;
};
static struct options options = {.records_per_s = 25, .mem_mib = 8, .pages_per_s = 200, .heartbeat_hz = 50};

static int console = -1;
static pthread_mutex_t console_lock = PTHREAD_MUTEX_INITIALIZER;

static int disks[MAX_DISKS], disk_count;
static pthread_mutex_t disk_lock = PTHREAD_MUTEX_INITIALIZER;    /* one write, or one whole check, at a time */
static volatile int writing = 1;
static volatile u64 promised;
static u32 *generations, blocks;

static u64 *memory;
static u32 pages;
static volatile u32 sweeps, page_errors, disk_errors;

static u64 mix(u64 x)
{
    x ^= x >> 31;
    x *= 0x7fb5d329728ea185ull;
    x ^= x >> 27;
    x *= 0x81dadef4bc2dd44dull;
    return x ^ x >> 33;
}

static void nap_ns(u64 ns)
{
    struct timespec t = {ns / 1000000000ull, ns % 1000000000ull};
    nanosleep(&t, 0);
}

static u64 now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* --- console -------------------------------------------------------------------------------------------------- */

/* A whole line or none: whoever reads slowly must not keep the guest waiting. True: it was said. */
static int say(const char *format, ...)
{
    char line[256];
    int waiting = 0, said = 0;
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    pthread_mutex_lock(&console_lock);
    if (ioctl(console, TIOCOUTQ, &waiting) || waiting + length < TTY_ROOM)
        said = write(console, line, length) == length;
    pthread_mutex_unlock(&console_lock);
    return said;
}

static void complain(volatile u32 *count, const char *what, u64 where, u64 got, u64 want)
{
    if (++*count <= MAX_TOLD)
        say("%s %llx %llx %llx", what, (unsigned long long)where, (unsigned long long)got, (unsigned long long)want);
}

/* The guest cannot run as told; said again and again, since the first time nobody may be listening. */
static void fatal(const char *format, ...)
{
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (;;) {
        say("FATAL %s", text);
        nap_ns(1000000000ull);
    }
}

/* --- disks ---------------------------------------------------------------------------------------------------- */

/* What a piece of a disk holds follows from its tag: the record's number, or the block's place and generation. */
static void fill(u64 *piece, u64 number, u64 generation)
{
    u64 sum = 0;
    piece[0] = MAGIC ^ options.seed;
    piece[1] = number;
    piece[2] = generation;
    for (int i = 4; i < WORDS; i++) {
        piece[i] = (number * 977 + generation) * i + i;
        sum += piece[i];
    }
    piece[3] = mix(sum ^ mix(number) ^ generation);
}

static int is_good(const u64 *piece, u64 number, u64 generation)
{
    u64 sum = 0;
    for (int i = 4; i < WORDS; i++)
        sum += piece[i];
    return piece[0] == (MAGIC ^ options.seed) && piece[1] == number && piece[2] == generation &&
           piece[3] == mix(sum ^ mix(number) ^ generation);
}

static void *aligned(size_t bytes)
{
    void *memory_ = 0;
    if (posix_memalign(&memory_, PAGE, bytes))
        fatal("no memory for %zu bytes", bytes);
    return memory_;
}

static void write_all(const void *bytes, size_t size, off_t at, int sync, u64 number)
{
    for (int d = 0; d < disk_count; d++)
        if (pwrite(disks[d], bytes, size, at) != (ssize_t)size || (sync && fdatasync(disks[d])))
            complain(&disk_errors, "D w", number, errno, d);
}

static void *write_records(void *unused)
{
    u64 *record = aligned(PAGE);
    for (;;) {
        u64 began = now_ns();
        if (writing) {
            u64 number = promised + 1;
            pthread_mutex_lock(&disk_lock);
            fill(record, number, 0);
            write_all(record, PAGE, RING_AT + (off_t)(number % SLOTS) * PAGE, 1, number);
            promised = number;
            pthread_mutex_unlock(&disk_lock);
        }
        u64 every = 1000000000ull / options.records_per_s, took = now_ns() - began;
        nap_ns(took < every ? every - took : 1000);
    }
    return unused;
}

static void *write_load(void *unused)
{
    char *block = aligned(BLOCK);
    u64 began = now_ns(), written = 0;
    for (u64 n = 0;; n++) {
        while (!writing)
            nap_ns(5000000);
        u32 which = mix(n) % blocks, generation = generations[which] + 1;
        for (int i = 0; i < PIECES; i++)
            fill((u64 *)(block + i * PAGE), (u64)which * PIECES + i, generation);
        pthread_mutex_lock(&disk_lock);
        write_all(block, BLOCK, LOAD_AT + (off_t)which * BLOCK, 0, which);
        generations[which] = generation;
        pthread_mutex_unlock(&disk_lock);
        u64 due = ++written * (BLOCK / 1024) * 1000000000ull / options.load_kib_per_s, elapsed = now_ns() - began;
        if (due > elapsed)
            nap_ns(due - elapsed);
        else if (elapsed - due > 1000000000ull) {   /* what could not be written in time is not made up for */
            began = now_ns();
            written = 0;
        }
    }
    return unused;
}

/* Reads every promised record and every block of this life; the number of good pieces, wrong ones are counted in *wrong. */
static u32 check_disk(int disk, u32 *wrong)
{
    u64 *block = aligned(BLOCK), last = promised;
    u32 good = 0;
    for (u64 number = last >= SLOTS ? last - SLOTS + 1 : 1; number <= last; number++) {
        off_t at = RING_AT + (off_t)(number % SLOTS) * PAGE;
        if (pread(disk, block, PAGE, at) == PAGE && is_good(block, number, 0))
            good++;
        else {
            ++*wrong;
            complain(&disk_errors, "D r", number, block[1], number);
        }
    }
    for (u32 which = 0; which < blocks; which++) {
        if (!generations[which])
            continue;
        int whole = pread(disk, block, BLOCK, LOAD_AT + (off_t)which * BLOCK) == BLOCK;
        for (u32 i = 0; i < PIECES; i++) {
            u64 *piece = block + i * WORDS;
            if (whole && is_good(piece, (u64)which * PIECES + i, generations[which]))
                good++;
            else {
                ++*wrong;
                complain(&disk_errors, "D b", (u64)which * PIECES + i, piece[2], generations[which]);
            }
        }
    }
    free(block);
    return good;
}

/* A guest that is started again goes on after the last record on its first disk. */
static void find_last_record(void)
{
    u64 *record = aligned(PAGE);
    for (u32 slot = 0; slot < SLOTS; slot++)
        if (pread(disks[0], record, PAGE, RING_AT + (off_t)slot * PAGE) == PAGE && record[1] % SLOTS == slot &&
            record[1] > promised && is_good(record, record[1], 0))
            promised = record[1];
    free(record);
}

static void open_disks(void)
{
    u64 needed = options.load_mib ? LOAD_AT + ((u64)options.load_mib << 20) : RING_AT + SLOTS * PAGE, size;
    for (char *name = strtok(options.disks, ","); name; name = strtok(0, ",")) {
        char path[80];
        snprintf(path, sizeof path, "/dev/%s", name);
        if (disk_count == MAX_DISKS)
            fatal("probe.disks names more than %d disks", MAX_DISKS);
        int disk = -1;
        for (int i = 0; i < 100 && (disk = open(path, O_RDWR | O_DIRECT)) < 0; i++)
            nap_ns(20000000);
        if (disk < 0)
            fatal("disk %s: %s", name, strerror(errno));
        if (ioctl(disk, BLKGETSIZE64, &size) || size < needed)
            fatal("disk %s has %llu bytes, the probe writes up to %llu", name, (unsigned long long)size, (unsigned long long)needed);
        disks[disk_count++] = disk;
    }
    if (!disk_count)
        return;
    find_last_record();
    blocks = options.load_kib_per_s ? options.load_mib << 20 >> 16 : 0;
    generations = calloc(blocks + 1, sizeof *generations);
}

/* --- memory --------------------------------------------------------------------------------------------------- */

static u64 *page(u32 number) { return memory + (u64)number * WORDS; }

static void *visit_memory(void *unused)
{
    u64 visit = 0;
    u32 at = 0, each = options.pages_per_s / 50 + 1;
    for (;;) {
        for (u32 i = 0; i < each; i++) {
            u64 *words = page(at);
            if (words[0] != visit || words[1] != mix(at)) {
                complain(&page_errors, "E c", at, words[0], visit);
                words[0] = visit;
            }
            words[0]++;
            if (++at == pages) {
                at = 0;
                visit++;
                sweeps++;
            }
        }
        nap_ns(20000000);
    }
    return unused;
}

static u32 check_memory(u32 *wrong)
{
    u32 good = 0;
    for (u32 number = 0; number < pages; number++) {
        u64 *words = page(number);
        int i = 2;
        while (i < WORDS && words[i] == mix((u64)number * WORDS + i))
            i++;
        if (i == WORDS && words[1] == mix(number))
            good++;
        else {
            ++*wrong;
            complain(&page_errors, "E h", number, words[i % WORDS], i);
        }
    }
    return good;
}

static void make_memory(void)
{
    pages = options.mem_mib * 256;
    memory = aligned((size_t)pages * PAGE);
    for (u32 number = 0; number < pages; number++) {
        u64 *words = page(number);
        for (int i = 2; i < WORDS; i++)
            words[i] = mix((u64)number * WORDS + i);
        words[0] = 0;
        words[1] = mix(number);
    }
}

/* --- what it is asked ----------------------------------------------------------------------------------------- */

static void verify(void)
{
    u32 wrong = 0, good = check_memory(&wrong);
    pthread_mutex_lock(&disk_lock);
    for (int d = 0; d < disk_count; d++)
        good += check_disk(disks[d], &wrong);
    pthread_mutex_unlock(&disk_lock);
    say("V %s %08x", wrong ? "bad" : "ok", wrong ? wrong : good);
}

static void stop_writing(void)
{
    writing = 0;
    pthread_mutex_lock(&disk_lock);
    for (int d = 0; d < disk_count; d++)
        fdatasync(disks[d]);
    pthread_mutex_unlock(&disk_lock);
}

static void obey(char letter)
{
    switch (letter) {
    case 'v':
        verify();
        break;
    case 'z':
        stop_writing();
        break;
    case 'r':
        writing = 1;
        break;
    case 'p':
        stop_writing();
        reboot(RB_POWER_OFF);
        break;
    }
}

static void *obey_console(void *unused)
{
    for (char letter;;)
        if (read(console, &letter, 1) == 1)
            obey(letter);
        else
            nap_ns(100000000);
    return unused;
}

/* --- network -------------------------------------------------------------------------------------------------- */

static int bound(int kind, int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, s = socket(AF_INET, kind, 0);
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (s < 0 || bind(s, (void *)&address, sizeof address))
        fatal("port %d: %s", port, strerror(errno));
    return s;
}

static void *echo_one(void *given)
{
    char bytes[16384];
    int s = (int)(intptr_t)given, got;
    while ((got = read(s, bytes, sizeof bytes)) > 0)
        for (int sent = 0, n; sent < got; sent += n)
            if ((n = write(s, bytes + sent, got - sent)) <= 0)
                goto over;
over:
    close(s);
    return 0;
}

static void *obey_one(void *given)
{
    int s = (int)(intptr_t)given;
    for (char letter; read(s, &letter, 1) == 1;) {
        obey(letter);
        char answer[40];
        int length = snprintf(answer, sizeof answer, "%c %llu\n", letter, (unsigned long long)promised);
        if (write(s, answer, length) != length)
            break;
    }
    close(s);
    return 0;
}

static void *accept_all(int port, void *(*serve)(void *))
{
    int listening = bound(SOCK_STREAM, port), one = 1;
    listen(listening, 8);
    for (;;) {
        int s = accept(listening, 0, 0);
        pthread_t thread;
        if (s < 0)
            continue;
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (pthread_create(&thread, 0, serve, (void *)(intptr_t)s))
            close(s);
        else
            pthread_detach(thread);
    }
    return 0;
}

static void *echo_tcp(void *unused) { return unused ? unused : accept_all(ECHO_PORT, echo_one); }

static void *obey_network(void *unused) { return unused ? unused : accept_all(CONTROL_PORT, obey_one); }

static void *echo_udp(void *unused)
{
    int s = bound(SOCK_DGRAM, ECHO_PORT);
    for (char bytes[2048];;) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        int got = recvfrom(s, bytes, sizeof bytes, 0, (void *)&from, &length);
        if (got > 0)
            sendto(s, bytes, got, 0, (void *)&from, length);
    }
    return unused;
}

static void set_up_link(int s, const char *name, u32 address)
{
    struct ifreq request = {0};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(address)};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (address) {
        memcpy(&request.ifr_addr, &in, sizeof in);
        ioctl(s, SIOCSIFADDR, &request);
        in.sin_addr.s_addr = htonl(0xffff0000);
        memcpy(&request.ifr_netmask, &in, sizeof in);
        ioctl(s, SIOCSIFNETMASK, &request);
    }
    ioctl(s, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    ioctl(s, SIOCSIFFLAGS, &request);
}

/* --- start ---------------------------------------------------------------------------------------------------- */

/* After a time without a CPU the beats that are due come all at once, and the console may be full: those that were left
 * out are counted, so that nobody takes them for lost. */
static void *beat(void *unused)
{
    u64 period = 1000000000ull / options.heartbeat_hz, at = now_ns();
    for (u32 number = 1, unsaid = 0;; number++) {
        unsaid += !say("H %08x %08x %08x %08x %08x %08x %08x", number, sweeps, page_errors, (u32)promised, disk_errors, 0, unsaid);
        at += period;
        struct timespec until = {at / 1000000000ull, at % 1000000000ull};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0);
    }
    return unused;
}

static void load_modules(void)
{
    char path[64];
    for (int i = 10; i < 99; i++) {     /* named by their place in the order */
        snprintf(path, sizeof path, "/modules/%d.ko", i);
        int file = open(path, O_RDONLY);
        if (file < 0)
            continue;
        syscall(SYS_finit_module, file, "", 0);
        close(file);
    }
}

static void read_number(const char *word, const char *key, u32 *number)
{
    size_t length = strlen(key);
    if (!strncmp(word, key, length) && word[length] == '=')
        *number = strtoul(word + length + 1, 0, 10);
}

static void read_options(void)
{
    static char line[4096];
    struct in_addr address;
    int file = open("/proc/cmdline", O_RDONLY), length = read(file, line, sizeof line - 1);
    close(file);
    line[length > 0 ? length : 0] = 0;
    for (char *word = strtok(line, " \n"); word; word = strtok(0, " \n")) {
        if (strncmp(word, "probe.", 6))
            continue;
        word += 6;
        read_number(word, "records_per_s", &options.records_per_s);
        read_number(word, "load_kib_per_s", &options.load_kib_per_s);
        read_number(word, "load_mib", &options.load_mib);
        read_number(word, "mem_mib", &options.mem_mib);
        read_number(word, "pages_per_s", &options.pages_per_s);
        read_number(word, "heartbeat_hz", &options.heartbeat_hz);
        if (!strncmp(word, "disks=", 6))
            snprintf(options.disks, sizeof options.disks, "%s", word + 6);
        if (!strncmp(word, "uuid=", 5))
            options.seed = strtoul(word + 5, 0, 16);    /* up to the first hyphen: eight digits */
        if (!strncmp(word, "address=", 8) && inet_aton(word + 8, &address))
            options.address = ntohl(address.s_addr);
    }
    if (!options.records_per_s || !options.heartbeat_hz || !options.mem_mib)
        fatal("probe.records_per_s, probe.heartbeat_hz and probe.mem_mib must be 1 at least");
    if (!options.address)
        options.address = 10u << 24 | 78u << 16 | (1 + (options.seed >> 16) % 254) << 8 | (1 + (options.seed & 0xffff) % 254);
}

static void open_console(void)
{
    struct termios raw;
    console = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    if (console < 0 || tcgetattr(console, &raw))
        return;
    cfmakeraw(&raw);
    tcsetattr(console, TCSANOW, &raw);
}

static void start(void *(*work)(void *))
{
    pthread_t thread;
    if (pthread_create(&thread, 0, work, 0))
        fatal("no thread: %s", strerror(errno));
}

int main(void)
{
    mount("proc", "/proc", "proc", 0, 0);
    mount("dev", "/dev", "devtmpfs", 0, 0);
    open_console();
    load_modules();
    read_options();
    int s = socket(AF_INET, SOCK_DGRAM, 0);
    set_up_link(s, "lo", 0);
    set_up_link(s, "eth0", options.address);
    close(s);
    make_memory();
    open_disks();
    say("BOOT linux period_us=%u address=%u.%u.%u.%u disks=%d promised=%llu", 1000000 / options.heartbeat_hz,
        options.address >> 24, options.address >> 16 & 255, options.address >> 8 & 255, options.address & 255, disk_count,
        (unsigned long long)promised);
    if (disk_count)
        start(write_records);
    if (disk_count && blocks)
        start(write_load);
    start(visit_memory);
    start(echo_tcp);
    start(echo_udp);
    start(obey_network);
    start(beat);
    obey_console(0);
}
