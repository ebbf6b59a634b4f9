//go:build linux

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// redisLoad asks a redis server as the HTTP load does: 12 clients that connect for each request, 4 that keep their connection and pause.
type redisLoad struct {
	addr     string
	over     chan struct{}
	running  sync.WaitGroup
	requests atomic.Int64

	mu     sync.Mutex // guards failed
	failed []error
}

func startRedisLoad(port int) *redisLoad {
	l := &redisLoad{addr: fmt.Sprintf("127.0.0.1:%d", port), over: make(chan struct{})}
	for range 12 {
		l.running.Go(l.oneRequest)
	}
	for i := range 4 {
		l.running.Go(func() { l.keptAlive(i) })
	}
	return l
}

func (l *redisLoad) stop() []error {
	close(l.over)
	l.running.Wait()
	return l.failed
}

func (l *redisLoad) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = append(l.failed, err)
}

func (l *redisLoad) ended() bool {
	select {
	case <-l.over:
		return true
	default:
		return false
	}
}

// ask sends a command and wants an answer that begins so.
func ask(c net.Conn, r *bufio.Reader, command, want string) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, command+"\r\n"); err != nil {
		return err
	}
	got, err := r.ReadString('\n')
	if err == nil && len(got) > 0 && got[0] == '$' {
		got, err = r.ReadString('\n')
	}
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if got != want+"\r\n" {
		return fmt.Errorf("%s: got %q, want %q", command, got, want)
	}
	return nil
}

func (l *redisLoad) oneRequest() {
	for !l.ended() {
		c, err := net.Dial("tcp", l.addr)
		if err == nil {
			err = ask(c, bufio.NewReader(c), "PING", "+PONG")
			c.Close()
		}
		l.requests.Add(1)
		if err != nil {
			l.fail(err)
			if errors.Is(err, syscall.ECONNREFUSED) {
				time.Sleep(5 * time.Millisecond) // as the HTTP load backs off
			}
		}
	}
}

func (l *redisLoad) keptAlive(i int) {
	for !l.ended() {
		c, err := net.Dial("tcp", l.addr)
		if err != nil {
			l.fail(err)
			continue
		}
		r := bufio.NewReader(c)
		for n := 0; !l.ended(); n++ {
			err := ask(c, r, fmt.Sprintf("SET client%d %d", i, n), "+OK")
			if err == nil {
				err = ask(c, r, fmt.Sprintf("GET client%d", i), fmt.Sprint(n))
			}
			l.requests.Add(2)
			if err != nil {
				l.fail(fmt.Errorf("kept alive, request %d: %w", n, err))
				break
			}
			// The pause; a close while nothing is in flight is no failure.
			_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if _, err := r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
		c.Close()
	}
}

func restartRedis(s *service) {
	s.t.Helper()
	l := startRedisLoad(s.port)
	stopped := false
	defer func() {
		if !stopped {
			l.stop()
		}
	}()
	more := func() {
		from := l.requests.Load()
		eventually(s.t, patience, "100 requests ended", func() bool { return l.requests.Load() >= from+100 })
	}
	more()
	for range restarts(s.t, 5) {
		s.restart()
		more()
	}
	stopped = true
	failed := l.stop()
	s.t.Logf("%d requests, %d failed", l.requests.Load(), len(failed))
	for _, err := range failed[:min(len(failed), 5)] {
		s.t.Error(err)
	}
}
