/* A wall clock that a test sets: preloaded into a broker (LD_PRELOAD), it adds what stands in the file that CLOCK_AHEAD names, a
 * signed number of milliseconds in eight bytes, to what the kernel says. Clocks that only go on stay as they are. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *ahead_ms;

__attribute__((constructor)) static void open_file(void)
{
	const char *path = getenv("CLOCK_AHEAD");
	int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	if (file < 0)
		return;
	void *at = mmap(NULL, sizeof *ahead_ms, PROT_READ, MAP_SHARED, file, 0);
	close(file);
	if (at != MAP_FAILED)
		ahead_ms = at;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	int failed = (int)syscall(SYS_clock_gettime, clock, now);
	if (failed || !ahead_ms || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE))
		return failed;
	int64_t ns = now->tv_nsec + *ahead_ms % 1000 * 1000000;
	now->tv_sec += *ahead_ms / 1000 + (ns >= 1000000000) - (ns < 0);
	now->tv_nsec = ns - (ns >= 1000000000) * 1000000000 + (ns < 0) * 1000000000;
	return 0;
}
