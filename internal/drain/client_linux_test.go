package drain

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// clients keep connections alive and send request after request on each.
type clients struct {
	t     testing.TB
	s     *server
	path  string
	pause time.Duration
	again bool // connect anew when a connection ends

	requests atomic.Int64 // answered
	idle     atomic.Int64 // connections closed while nothing was in flight
	met      atomic.Int64 // requests that met the server's close: no byte of a response came
	cut      atomic.Int64 // responses that ended too early

	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup
}

// run starts n clients; the test's end stops them. It returns when each has been answered a few times.
func run(t testing.TB, s *server, n int, path string, pause time.Duration, again bool) *clients {
	t.Helper()
	c := &clients{t: t, s: s, path: path, pause: pause, again: again}
	c.ctx, c.stop = context.WithCancel(context.Background())
	for range n {
		c.wg.Go(c.client)
	}
	t.Cleanup(c.end)
	until(t, "answers", func() bool { return c.requests.Load() >= int64(3*n) })
	return c
}

// end stops the clients, each when its request is answered.
func (c *clients) end() {
	c.stop()
	c.wg.Wait()
}

func (c *clients) String() string {
	return fmt.Sprintf("%d requests, %d closed while idle, %d met a close, %d cut", c.requests.Load(), c.idle.Load(), c.met.Load(), c.cut.Load())
}

func (c *clients) client() {
	for c.ctx.Err() == nil {
		conn, err := net.Dial("tcp", c.s.address.String())
		if err != nil {
			c.t.Error(err)
			return
		}
		c.converse(conn)
		conn.Close()
		if !c.again {
			return
		}
	}
}

// converse uses one connection until it ends.
func (c *clients) converse(conn net.Conn) {
	r := bufio.NewReader(conn)
	request := []byte("GET " + c.path + " HTTP/1.1\r\nHost: test\r\n\r\n")
	for c.ctx.Err() == nil {
		if _, err := conn.Write(request); err != nil {
			c.met.Add(1)
			return
		}
		if _, err := r.Peek(1); err != nil {
			c.met.Add(1)
			return
		}
		response, err := http.ReadResponse(r, nil)
		if err == nil {
			_, err = io.Copy(io.Discard, response.Body)
		}
		if err != nil {
			c.cut.Add(1)
			return
		}
		c.requests.Add(1)
		if c.pause == 0 {
			continue
		}
		conn.SetReadDeadline(time.Now().Add(c.pause))
		if _, err := r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
			c.idle.Add(1)
			return
		}
		conn.SetReadDeadline(time.Time{})
	}
}
