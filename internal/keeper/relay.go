//go:build linux

package keeper

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// relayQuiet is how long a relay waits for a handshake that was under way when its listener became unreachable:
// two retransmissions of a SYN-ACK.
const relayQuiet = 3 * time.Second

// relay is the life of a process that forwards the connections waiting on a listener, whose form no generation has, to
// the program. It ends with the last of them.
func relay() int {
	file := os.NewFile(3, "listener")
	l, err := net.FileListener(file)
	file.Close()
	if err != nil || len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "berth: error: relay:", err)
		return 1
	}
	listener := l.(*net.TCPListener)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer listener.Close()
	for {
		_ = listener.SetDeadline(time.Now().Add(relayQuiet))
		client, err := listener.AcceptTCP()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return 0
		}
		if err != nil {
			continue
		}
		wg.Go(func() { forward(client, os.Args[1]) })
	}
}

func forward(client *net.TCPConn, to string) {
	defer client.Close()
	c, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	server := c.(*net.TCPConn)
	defer server.Close()
	var wg sync.WaitGroup
	pipe := func(to, from *net.TCPConn) {
		_, _ = io.Copy(to, from)
		_ = to.CloseWrite()
	}
	wg.Go(func() { pipe(server, client) })
	pipe(client, server)
	wg.Wait()
}

// Child runs what the executable is when the keeper starts it under one of the names above, and reports whether it did.
// The supervisor's own life is the given function.
func Child(supervisor func(sock *os.File) int) bool {
	if strings.HasPrefix(os.Args[0], "berth-") {
		syscall.CloseOnExec(3) // the socket or listener that the keeper gave it
	}
	switch os.Args[0] {
	case supervisorName:
		os.Exit(supervisor(os.NewFile(3, "keeper")))
	case shimName:
		shim()
	case relayName:
		os.Exit(relay())
	default:
		return false
	}
	return true
}
