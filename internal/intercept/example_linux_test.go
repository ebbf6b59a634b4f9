package intercept_test

import (
	"fmt"
	"runtime"
	"syscall"

	"github.com/berth-net/berth/internal/intercept"
)

// One thread of this program is watched by the rest of it; otherwise the watched one would be another program.
func Example() {
	listeners := make(chan *intercept.Listener)
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the filter stays, so the thread ends with the goroutine
		f, err := intercept.Filter{}.Install()
		if err != nil {
			result <- err
			close(listeners)
			return
		}
		listeners <- intercept.NewListener(f)
		sock, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			result <- err
			return
		}
		defer syscall.Close(sock)
		result <- syscall.Bind(sock, &syscall.SockaddrInet4{Port: 8080, Addr: [4]byte{127, 0, 0, 1}})
	}()
	l, ok := <-listeners
	if !ok {
		fmt.Println(<-result)
		return
	}
	defer l.Close()
	call, err := l.Recv()
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(call.Op, call.Addr)
	if err := call.Return(syscall.EADDRINUSE); err != nil {
		fmt.Println(err)
	}
	fmt.Println(<-result)
	// Output:
	// bind 127.0.0.1:8080
	// address already in use
}
