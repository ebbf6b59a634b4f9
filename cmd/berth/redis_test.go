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

// ask sends commands at once and wants these lines in answer.
func ask(c net.Conn, r *bufio.Reader, commands string, want ...string) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, commands); err != nil {
		return err
	}
	for _, line := range want {
		got, err := r.ReadString('\n')
		if err != nil {
			return fmt.Errorf("%q: %w", commands, err)
		}
		if got != line+"\r\n" {
			return fmt.Errorf("%q: got %q, want %q", commands, got, line)
		}
	}
	return nil
}

func (l *redisLoad) oneRequest() {
	for !l.ended() {
		c, err := net.Dial("tcp", l.addr)
		if err == nil {
			err = ask(c, bufio.NewReader(c), "PING\r\n", "+PONG")
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
			// In one go, so that something is in flight until both are answered.
			value := fmt.Sprint(n)
			err := ask(c, r, fmt.Sprintf("SET client%d %s\r\nGET client%d\r\n", i, value, i), "+OK", fmt.Sprintf("$%d", len(value)), value)
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
