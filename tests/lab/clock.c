/* A wall clock that is off by the seconds in /etc/clock-shift; the time since boot is left alone. Compiled on the lab
   host that needs it and loaded by LD_PRELOAD. The file is read each time, so that the clock can be set. */
struct timespec { long seconds, nanoseconds; };
struct timeval { long seconds, microseconds; };
extern void *dlsym(void *, const char *), *dlvsym(void *, const char *, const char *);
extern int open(const char *, int, ...), close(int), atoi(const char *);
extern long read(int, void *, unsigned long);
#define NEXT ((void *)-1L)

static long shift(void)
{
    char text[32] = "";
    int file = open("/etc/clock-shift", 0);
    if (file >= 0) {
        long length = read(file, text, sizeof text - 1);
        text[length > 0 ? length : 0] = 0;
        close(file);
    }
    return atoi(text);
}

int clock_gettime(int clock, struct timespec *now)
{
    static int (*real)(int, struct timespec *);
    if (!real)
        real = dlsym(NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == 0 || clock == 5)) /* CLOCK_REALTIME and its coarse sister */
        now->seconds += shift();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec exact;
    clock_gettime(0, &exact);
    now->seconds = exact.seconds;
    now->microseconds = exact.nanoseconds / 1000;
    return 0;
}

long time(long *place)
{
    struct timespec exact;
    clock_gettime(0, &exact);
    if (place)
        *place = exact.seconds;
    return exact.seconds;
}

/* Whoever waits until a time of day reckons with the shifted one, and the kernel does not: C++'s condition variables as
   LoadGen's wheel has them. A time since boot is no such time, and is never so large. */
static const struct timespec *unshifted(const struct timespec *until, struct timespec *own)
{
    *own = *until;
    if (until->seconds > 500000000)
        own->seconds -= shift();
    return own;
}

int pthread_cond_timedwait(void *condition, void *mutex, const struct timespec *until)
{
    static int (*real)(void *, void *, const struct timespec *);
    struct timespec own;
    if (!real) /* by its version: there is an older one, for other condition variables */
        real = dlvsym(NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real)
        real = dlsym(NEXT, "pthread_cond_timedwait");
    return real(condition, mutex, unshifted(until, &own));
}

int sem_timedwait(void *semaphore, const struct timespec *until)
{
    static int (*real)(void *, const struct timespec *);
    struct timespec own;
    if (!real)
        real = dlsym(NEXT, "sem_timedwait");
    return real(semaphore, unshifted(until, &own));
}
