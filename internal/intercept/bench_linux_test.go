package intercept

import (
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"testing"

	"github.com/berth-net/berth/internal/sys"
)

// BenchmarkBind measures a bind, from a program's point of view. It fails, for the address is nobody's, so that the same socket
// can be bound again.
func BenchmarkBind(b *testing.B) {
	nobodys := netip.MustParseAddrPort("192.0.2.1:80")
	work := func(b *testing.B) {
		sock, err := sys.StreamSocket(sys.INET)
		if err != nil {
			b.Error(err)
			return
		}
		defer sock.Close()
		for b.Loop() {
			if err := sys.Bind(sock, sys.INET, nobodys); err != syscall.EADDRNOTAVAIL {
				b.Error(err)
			}
		}
	}
	b.Run("unwatched", func(b *testing.B) { onBenchThread(b, nil, work) })
	b.Run("continued", func(b *testing.B) { onBenchThread(b, (*Call).Continue, work) })
	b.Run("adopted", func(b *testing.B) {
		onBenchThread(b, func(c *Call) error {
			sock, err := c.Socket()
			if err != nil {
				return err
			}
			defer sock.Close()
			if err := sys.SetReusePort(sock, true); err != nil {
				return err
			}
			return c.Return(sys.Errno(sys.Bind(sock, sys.INET, c.Addr)))
		}, work)
	})
}

// BenchmarkListen measures a listen.
func BenchmarkListen(b *testing.B) {
	work := func(b *testing.B) {
		sock, err := sys.StreamSocket(sys.INET)
		if err != nil {
			b.Error(err)
			return
		}
		defer sock.Close()
		for b.Loop() {
			if err := sys.ListenOn(sock, 128); err != nil {
				b.Error(err)
			}
		}
	}
	b.Run("unwatched", func(b *testing.B) { onBenchThread(b, nil, work) })
	b.Run("continued", func(b *testing.B) { onBenchThread(b, (*Call).Continue, work) })
}

// BenchmarkOther measures a system call that is not announced.
func BenchmarkOther(b *testing.B) {
	work := func(b *testing.B) {
		for b.Loop() {
			syscall.RawSyscall(syscall.SYS_GETPPID, 0, 0, 0)
		}
	}
	b.Run("unwatched", func(b *testing.B) { onBenchThread(b, nil, work) })
	b.Run("watched", func(b *testing.B) { onBenchThread(b, (*Call).Continue, work) })
}

// onBenchThread runs work on a thread whose calls are answered by answer, or that isn't watched if answer is nil.
func onBenchThread(b *testing.B, answer func(*Call) error, work func(*testing.B)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the filter stays, so the thread must end with the goroutine
		if answer == nil {
			work(b)
			return
		}
		f, err := Filter{}.Install()
		if err != nil {
			b.Error(err)
			return
		}
		l := NewListener(f)
		answered := make(chan error)
		go func() {
			for {
				c, err := l.Recv()
				if err == nil {
					err = answer(c)
				}
				if err != nil {
					answered <- err
					return
				}
			}
		}()
		work(b)
		l.Close()
		if err := <-answered; err != os.ErrClosed {
			b.Error(err)
		}
	}()
	<-done
}
