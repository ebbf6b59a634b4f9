package load

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/berth-net/berth/internal/sys"
)

// A role is a sort of client.
type role uint8

const (
	oneRequest role = iota
	keptAlive
	pipelined
	slowReader

	roles
)

// aLongTimeAgo is a deadline that ends a wait at once.
var aLongTimeAgo = time.Unix(1, 0)

// errClosed is how the text of an end of file reads.
var errClosed = errors.New("closed by the server")

// A client sends requests, one exchange after the other, in a goroutine of its own.
type client struct {
	g     *Generator
	role  role
	pause time.Duration
	delay time.Duration // before its first request
	depth int

	// began is the time since the run's start at which the exchange in flight began, in ns; 0 when there is none.
	began atomic.Int64

	// mu guards idle, and conn against those who set its deadline from outside: wake and expire. The client itself
	// reads conn without it.
	mu   sync.Mutex
	conn *conn
	idle bool // nothing is in flight on conn, and the client watches it

	r      *bufio.Reader
	body   []byte
	search search
}

func newClient(g *Generator, r role, index, of int) *client {
	c := &client{
		g: g, role: r, depth: 1,
		r:      bufio.NewReader(nil),
		body:   make([]byte, 16<<10),
		search: search{want: g.expect},
	}
	switch r {
	case oneRequest, slowReader:
		c.pause = g.config.PauseBetween
	case pipelined:
		c.depth = g.config.Depth
		c.pause = g.config.Pause
	default:
		c.pause = g.config.Pause
	}
	c.delay = time.Duration(float64(c.pause) * float64(index) / float64(of))
	return c
}

func (c *client) run() {
	defer c.hangUp()
	owed := 0 // requests that it has claimed and not sent
	wait := c.delay
	for {
		// Claimed before the pause: who gets none needn't sit out its pause.
		if owed == 0 {
			owed = c.g.claim(c.depth)
		}
		if owed == 0 || !c.rest(wait) {
			return
		}
		ended, connected := c.exchange(owed)
		owed -= ended
		wait = c.pause
		if !connected {
			wait = max(wait, c.g.config.Backoff)
		}
	}
}

// rest waits, and watches the connection while it does. It reports whether the run goes on.
func (c *client) rest(d time.Duration) bool {
	if d > 0 {
		until := time.Now().Add(d)
		c.watch(until)
		if c.conn == nil {
			c.sleep(time.Until(until))
		}
	}
	return !c.g.stopping.Load()
}

func (c *client) sleep(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.g.stopped:
	}
}

// watch waits until a moment, or until the server ends the connection, which is then hung up.
func (c *client) watch(until time.Time) {
	if c.conn == nil {
		return
	}
	c.setIdle(true)
	err := c.conn.SetReadDeadline(until)
	// Looked at after the deadline is set, so that a wake's own deadline can't be undone unseen.
	if err == nil && !c.g.stopping.Load() {
		_, err = c.r.Peek(1)
	}
	c.setIdle(false)
	switch {
	case err == nil && c.r.Buffered() == 0, errors.Is(err, os.ErrDeadlineExceeded):
	case err == nil:
		c.unaskedBuffered()
	default:
		c.closedIdle(err)
	}
}

func (c *client) setIdle(idle bool) {
	c.mu.Lock()
	c.idle = idle
	c.mu.Unlock()
}

// wake ends a pause.
func (c *client) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle {
		_ = c.conn.SetReadDeadline(aLongTimeAgo) // fails only on a closed connection, which nobody waits for
	}
}

// expire ends whatever the client waits for.
func (c *client) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		_ = c.conn.SetDeadline(aLongTimeAgo) // as in wake
	}
}

// setDeadline bounds the exchange.
func (c *client) setDeadline(t time.Time) error {
	if err := c.conn.SetDeadline(t); err != nil {
		return err
	}
	// Looked at after the deadline is set: if the run is aborted after this, expire sets it again.
	if c.g.aborted.Load() {
		return c.conn.SetDeadline(aLongTimeAgo)
	}
	return nil
}

// look makes sure, right before a request is sent, that the connection is still there and quiet.
func (c *client) look() {
	if c.conn == nil {
		return
	}
	var p [len(timeoutNotice)]byte
	switch n, err := c.conn.Peek(p[:]); {
	case err != nil:
		c.closedIdle(err)
	case n > 0:
		c.unasked(p[:n])
	}
}

func (c *client) closedIdle(err error) {
	if errors.Is(err, io.EOF) {
		err = errClosed
	}
	c.g.counts.closedIdle.add(time.Since(c.g.start), err, false)
	c.hangUp()
}

// timeoutNotice is how the response begins by which some servers say that they close an idle connection (RFC 9110,
// 15.5.9). The version's last digit isn't compared.
const timeoutNotice = "HTTP/1.x 408"

// unasked handles bytes that came when no request was in flight. They show the response before them to be longer than
// it said, so it was a wrong answer although it has been counted as a good one.
func (c *client) unasked(p []byte) {
	if len(p) >= len(timeoutNotice) && bytes.HasPrefix(p, []byte("HTTP/1.")) && bytes.HasPrefix(p[8:], []byte(" 408")) {
		c.closedIdle(errors.New("closed by the server with status 408"))
		return
	}
	if c.conn.well {
		c.g.counts.failures[WrongAnswer].add(time.Since(c.g.start),
			fmt.Errorf("bytes after the end of the response: %q", p[:min(len(p), 16)]), false)
		c.g.counts.failed.Add(1)
	}
	c.hangUp()
}

func (c *client) unaskedBuffered() {
	p, _ := c.r.Peek(c.r.Buffered()) // never more than there is, so it can't fail
	c.unasked(p)
}

func (c *client) connect(deadline time.Time) error {
	g := c.g
	var o sys.ConnectOptions
	if g.spread != nil {
		o.Source = g.spread.source()
	}
	if c.role == slowReader {
		o.ReceiveBuffer = slowBuffer
	}
	conn, err := startConn(&g.counts, g.target, o)
	if err != nil {
		return err
	}
	if c.role == slowReader {
		conn.pace = &pace{rate: g.config.SlowRate, timeout: g.config.Timeout, abort: g.aborting}
	}
	c.mu.Lock()
	c.conn = conn
	c.mu.Unlock()
	err = c.setDeadline(deadline)
	if err == nil {
		err = conn.FinishConnect()
	}
	if err != nil {
		c.hangUp()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("not connected within the timeout: %w", err)
		}
		return err
	}
	g.counts.connections.Add(1)
	c.r.Reset(conn)
	return nil
}

func (c *client) hangUp() {
	c.mu.Lock()
	conn := c.conn
	c.conn = nil
	c.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}

// exchange sends n requests at once, connecting first where there is no connection, and reads their responses. It
// returns how many have ended, and whether there was a connection to send them on.
func (c *client) exchange(n int) (ended int, connected bool) {
	g := c.g
	c.look()
	start := time.Now()
	began := max(1, start.Sub(g.start))
	c.began.Store(int64(began))
	defer c.began.Store(0)

	var unsent error
	deadline := start.Add(g.config.Timeout)
	if c.conn != nil {
		unsent = c.setDeadline(deadline)
	} else if err := c.connect(deadline); err != nil {
		if !c.givenUp(err, 1) {
			c.fail(began, kindOfConnect(err), err)
		}
		return 1, false
	}
	if unsent == nil {
		_, unsent = c.conn.Write(g.batch[:n*len(g.request)])
	}
	c.conn.met = nil
	if timedOut(unsent) {
		c.failRest(began, n, false, unsent)
		c.hangUp()
		return n, true
	}
	// Read after any other failed write too: a server may answer and close without reading all that it is sent.
	if last := c.receiveAll(began, n, unsent); last || c.role == oneRequest || c.role == slowReader {
		c.hangUp()
	}
	return n, true
}

// receiveAll reads n responses and counts how they end. It reports whether the connection is of no more use. unsent
// is the error of the requests' write.
func (c *client) receiveAll(began time.Duration, n int, unsent error) (last bool) {
	conn := c.conn
	for i := range n {
		begun, received := c.r.Buffered() > 0, conn.received
		var wrong, err error
		last, wrong, err = c.receive()
		if err != nil {
			if cut := conn.cut(unsent); cut != nil {
				c.failRest(began, n-i, begun || conn.received > received, cut)
				return true
			}
			// The connection is well, so it's the response that can't be read, and none can be found after it.
			for range n - i {
				c.fail(began, WrongAnswer, err)
			}
			return true
		}
		if wrong != nil {
			c.fail(began, WrongAnswer, wrong)
		} else {
			c.succeed(began)
		}
		conn.answered, conn.well = true, wrong == nil
		if last {
			err := fmt.Errorf("closed by the server after %d of %d pipelined requests", i+1, n)
			for range n - i - 1 {
				c.fail(began, Race, err)
			}
			break
		}
	}
	if c.r.Buffered() > 0 {
		c.unaskedBuffered()
		last = true
	}
	return last
}

// receive reads one response. It returns an error when that has no end, else what is wrong with it, and whether it is
// the last one of its connection.
func (c *client) receive() (last bool, wrong, err error) {
	c.conn.headroom = maxHeader
	var resp *http.Response
	for {
		resp, err = http.ReadResponse(c.r, nil)
		if err != nil {
			return false, nil, err
		}
		if resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			break
		}
	}
	c.conn.headroom = math.MaxInt64
	c.search.reset()
	for err == nil {
		var n int
		n, err = resp.Body.Read(c.body)
		c.search.add(c.body[:n])
	}
	if err != io.EOF {
		return false, nil, err
	}
	if saysClose(resp) {
		c.g.counts.connectionClose.Add(1)
	}
	switch {
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		wrong = fmt.Errorf("status %s", resp.Status)
	case !c.search.found:
		wrong = fmt.Errorf("no %q in a body that begins %q", c.search.want, c.search.head)
	}
	return resp.Close, wrong, nil
}

// saysClose reports whether the response announces its connection's end. An HTTP/1.0 one that doesn't is the last one
// all the same. From an HTTP/1.1 one, http.ReadResponse takes the header away, and sets Close for it and for a body
// without a length.
func saysClose(r *http.Response) bool {
	if r.ProtoAtLeast(1, 1) {
		return r.Close
	}
	for _, v := range r.Header["Connection"] {
		for token := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(token), "close") {
				return true
			}
		}
	}
	return false
}

func (c *client) succeed(began time.Duration) {
	counts := &c.g.counts
	var d time.Duration
	if c.role == slowReader {
		// How long it took to read says nothing of the server.
		d = c.conn.first.Sub(c.g.start) - began
	} else {
		d = time.Since(c.g.start) - began
		counts.waited(d)
	}
	counts.waits[c.role].add(d)
	counts.requests.Add(1)
}

func (c *client) fail(began time.Duration, kind Kind, err error) {
	now := time.Since(c.g.start)
	counts := &c.g.counts
	if c.role != slowReader {
		counts.waited(now - began)
	}
	counts.failures[kind].add(now, err, kind == Other)
	counts.requests.Add(1)
	counts.failed.Add(1)
}

// failRest counts n requests whose connection ended before their responses did. begun says that some of the first
// one's had come.
func (c *client) failRest(began time.Duration, n int, begun bool, err error) {
	if c.givenUp(err, n) {
		return
	}
	for range n {
		c.fail(began, kindOfCut(err, begun, c.conn.answered), c.cutText(err, begun))
		begun = false
	}
}

func (c *client) cutText(err error, begun bool) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("no whole response within %v", c.g.config.Timeout)
	case errors.Is(err, io.EOF):
		err = errClosed
	}
	if begun {
		return fmt.Errorf("within the response: %w", err)
	}
	return fmt.Errorf("before the response: %w", err)
}

// givenUp counts n requests as unfinished, if err comes from the run's being aborted.
func (c *client) givenUp(err error, n int) bool {
	if !c.g.aborted.Load() || !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	c.g.counts.unfinished.Add(int64(n))
	return true
}
