package sys

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// OutputPipe makes a pipe for a program's output. The program's end is open for reading too, so that
// the program never meets EPIPE or SIGPIPE when the process that copies its output is replaced.
func OutputPipe() (read, program *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	defer unix.Close(fds[1])
	both, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fds[1]), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(fds[0])
		return nil, nil, os.NewSyscallError("open", err)
	}
	// A larger pipe bridges a pause of the reader; an ordinary user may be refused it.
	_, _ = unix.FcntlInt(uintptr(both), unix.F_SETPIPE_SZ, 1<<20)
	return os.NewFile(uintptr(fds[0]), "output"), os.NewFile(uintptr(both), "output"), nil
}

// OutputTerminal makes a pseudo-terminal like the given one for a program's output: what is written arrives byte for byte.
func OutputTerminal(like *os.File) (read, program *os.File, err error) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("open /dev/ptmx", err)
	}
	fail := func(call string, err error) (*os.File, *os.File, error) {
		unix.Close(master)
		return nil, nil, os.NewSyscallError(call, err)
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return fail("ioctl TIOCSPTLCK", err)
	}
	number, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		return fail("ioctl TIOCGPTN", err)
	}
	slave, err := unix.Open(fmt.Sprintf("/dev/pts/%d", number), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail("open pty", err)
	}
	if t, err := unix.IoctlGetTermios(slave, unix.TCGETS); err == nil {
		t.Oflag &^= unix.OPOST // the real terminal does it
		t.Lflag &^= unix.ECHO
		_ = unix.IoctlSetTermios(slave, unix.TCSETS, t)
	}
	_ = control(like, func(fd int) error {
		if size, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ); err == nil {
			_ = unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, size)
		}
		return nil
	})
	return os.NewFile(uintptr(master), "output"), os.NewFile(uintptr(slave), "output"), nil
}

// IsTerminal reports whether the file is a terminal.
func IsTerminal(f *os.File) bool {
	return control(f, func(fd int) error {
		_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		return err
	}) == nil
}

// SameFile reports whether two descriptors lead to one file, as after 2>&1.
func SameFile(a, b *os.File) bool {
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}
