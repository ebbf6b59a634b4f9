package load_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/load"
)

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

// A visit is one connection to a server of serve's, which does whatever its test wants.
type visit struct {
	*net.TCPConn
	n int // of the connection, from 0
	t *testing.T
}

// request reads one whole request, so that nothing unread turns the next close into a reset. It reports false at the
// end of the connection.
func (v *visit) request() bool {
	var got []byte
	b := make([]byte, 1)
	for !bytes.HasSuffix(got, []byte("\r\n\r\n")) {
		if _, err := v.Read(b); err != nil {
			return false
		}
		got = append(got, b[0])
	}
	return true
}

func (v *visit) say(s string) {
	if _, err := io.WriteString(v, s); err != nil {
		v.t.Errorf("connection %d: %v", v.n, err)
	}
}

// reset makes the close that follows an RST.
func (v *visit) reset() {
	if err := v.SetLinger(0); err != nil {
		v.t.Error(err)
	}
}

// awaitEnd waits until the client has closed.
func (v *visit) awaitEnd() { _, _ = io.Copy(io.Discard, v) }

// serve runs handle for each connection, and closes it afterwards. It returns the URL.
func serve(t *testing.T, address string, handle func(*visit)) string {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				handle(&visit{TCPConn: c.(*net.TCPConn), n: n, t: t})
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return "http://" + l.Addr().String()
}

// run runs a generator, and fails the test if that leaves a descriptor or a goroutine behind, or numbers that don't
// add up.
func run(t *testing.T, c load.Config) *load.Report {
	t.Helper()
	return runWith(t, t.Context(), c, nil)
}

func runWith(t *testing.T, ctx context.Context, c load.Config, meanwhile func(*load.Generator)) *load.Report {
	t.Helper()
	g, err := load.New(c)
	if err != nil {
		t.Fatal(err)
	}
	var beside sync.WaitGroup
	if meanwhile != nil {
		beside.Go(func() { meanwhile(g) })
	}
	r, err := g.Run(ctx)
	beside.Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", r)
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	if bytes.Contains(stacks, []byte("load.(*client)")) {
		t.Errorf("a client outlives its run:\n%s", stacks)
	}
	sum := int64(0)
	for _, f := range r.Failures {
		sum += f.Count
	}
	if sum != r.Failed || r.OK+r.Failed != r.Requests {
		t.Errorf("%d failures of all kinds, %d failed, %d ok, %d requests: they don't add up", sum, r.Failed, r.OK, r.Requests)
	}
	return r
}

// failures returns the kinds that happened, and how often.
func failures(r *load.Report) map[load.Kind]int64 {
	m := map[load.Kind]int64{}
	for k, f := range r.Failures {
		if f.Count > 0 {
			m[k] = f.Count
		}
	}
	return m
}

func wantFailures(t *testing.T, r *load.Report, want map[load.Kind]int64) {
	t.Helper()
	if got := failures(r); !reflect.DeepEqual(got, want) {
		t.Errorf("failures %v, want %v", got, want)
	}
}

// openFiles counts this process's descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestOneRequestFailures(t *testing.T) {
	for _, test := range []struct {
		name   string
		handle func(*visit)
		config load.Config
		want   load.Kind
	}{
		{"reset at accept", func(v *visit) { v.reset() }, load.Config{}, load.Reset},
		{"reset at the request", func(v *visit) { v.request(); v.reset() }, load.Config{}, load.Reset},
		{"closed at the request", func(v *visit) { v.request() }, load.Config{}, load.CutShort},
		{"closed in the status line", func(v *visit) { v.request(); v.say("HTTP/1.1 2") }, load.Config{}, load.CutShort},
		{"closed in the header", func(v *visit) { v.request(); v.say("HTTP/1.1 200 OK\r\nContent-Len") }, load.Config{}, load.CutShort},
		{"closed in the body", func(v *visit) { v.request(); v.say(ok[:len(ok)-1]) }, load.Config{}, load.CutShort},
		{"reset in the body", func(v *visit) { v.request(); v.say(ok[:len(ok)-1]); v.reset() }, load.Config{}, load.CutShort},
		{"closed in a chunk", func(v *visit) {
			v.request()
			v.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel")
		}, load.Config{}, load.CutShort},
		{"closed before the last chunk", func(v *visit) {
			v.request()
			v.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
		}, load.Config{}, load.CutShort},
		{"closed before the last line", func(v *visit) {
			v.request()
			v.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n")
		}, load.Config{}, load.CutShort},
		{"reset in a body that only a close ends", func(v *visit) {
			v.request()
			v.say("HTTP/1.0 200 OK\r\n\r\nhello")
			v.reset()
		}, load.Config{}, load.CutShort},
		{"no answer", func(v *visit) { v.request(); v.awaitEnd() },
			load.Config{Timeout: 20 * time.Millisecond}, load.TimedOut},
		{"half an answer", func(v *visit) { v.request(); v.say(ok[:len(ok)-1]); v.awaitEnd() },
			load.Config{Timeout: 20 * time.Millisecond}, load.TimedOut},
		{"status 500", func(v *visit) {
			v.request()
			v.say("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
		}, load.Config{}, load.WrongAnswer},
		{"status 101", func(v *visit) { v.request(); v.say("HTTP/1.1 101 Switching Protocols\r\n\r\n") },
			load.Config{}, load.WrongAnswer},
		{"wrong body", func(v *visit) { v.request(); v.say(ok) }, load.Config{Expect: "hullo"}, load.WrongAnswer},
		{"no response at all", func(v *visit) { v.request(); v.say("220 mail.example ESMTP\r\n"); v.awaitEnd() },
			load.Config{}, load.WrongAnswer},
		{"a malformed chunk", func(v *visit) {
			v.request()
			v.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n")
			v.awaitEnd()
		}, load.Config{}, load.WrongAnswer},
		{"a header without end", func(v *visit) {
			v.request()
			v.say("HTTP/1.1 200 OK\r\n")
			for {
				if _, err := io.WriteString(v, "X: "+strings.Repeat("x", 4000)+"\r\n"); err != nil {
					return
				}
			}
		}, load.Config{}, load.WrongAnswer},
		{"bytes after the end", func(v *visit) { v.request(); v.say(ok + "!"); v.awaitEnd() }, load.Config{}, load.WrongAnswer},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := openFiles(t)
			t.Cleanup(func() {
				if after := openFiles(t); after > before {
					t.Errorf("%d descriptors are open, %d were before", after, before)
				}
			})
			test.config.URL = serve(t, "127.0.0.1:0", test.handle)
			test.config.OneRequest = 2
			test.config.Requests = 5
			wantFailures(t, run(t, test.config), map[load.Kind]int64{test.want: 5})
		})
	}
}

func TestAnswers(t *testing.T) {
	for _, test := range []struct{ name, response string }{
		{"counted", ok},
		{"chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"},
		{"chunked with a trailer", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n"},
		{"ended by the close", "HTTP/1.1 200 OK\r\n\r\nhello"},
		{"HTTP/1.0", "HTTP/1.0 200 OK\r\n\r\nhello"},
		{"after early hints", "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + ok},
	} {
		t.Run(test.name, func(t *testing.T) {
			url := serve(t, "127.0.0.1:0", func(v *visit) { v.request(); v.say(test.response) })
			r := run(t, load.Config{URL: url, OneRequest: 1, KeepAlive: 1, Requests: 6, Expect: "hello"})
			// A kept-alive client may meet the close, which this server announces only sometimes.
			if n := r.Failed - r.Failures[load.Race].Count; n != 0 || r.OK == 0 {
				t.Errorf("%d failed, %d ok", n, r.OK)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	// The port is held by a connection's near end, so nothing can come to listen there.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
	c, err := d.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, noSpread := range []bool{false, true} {
		before := openFiles(t)
		r := run(t, load.Config{
			URL: c.LocalAddr().String(), OneRequest: 2, KeepAlive: 1, Pipelined: 1, SlowReaders: 1,
			Requests: 50, Backoff: -1, NoSpread: noSpread,
		})
		wantFailures(t, r, map[load.Kind]int64{load.Refused: 50})
		if r.Connections != 0 || r.Latency != (load.Latencies{}) || r.Spread == noSpread {
			t.Errorf("connections %d, latency %v, spread %v", r.Connections, r.Latency, r.Spread)
		}
		if after := openFiles(t); after > before {
			t.Errorf("%d descriptors are open, %d were before", after, before)
		}
	}
}

// TCP knows no broadcast, and the kernel says so at once.
func TestOtherIsNamed(t *testing.T) {
	r := run(t, load.Config{URL: "http://255.255.255.255:80", OneRequest: 1, Requests: 1})
	f := r.Failures[load.Other]
	if f.Count != 1 || f.Names["ENETUNREACH"] != 1 {
		t.Errorf("other: %+v", f)
	}
}

func TestRace(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(*visit)
	}{
		{"closed when the request has come", func(v *visit) { v.request() }},
		{"reset when the request has come", func(v *visit) { v.request(); v.reset() }},
		{"closed with the request unread", func(v *visit) {
			if _, err := v.Read(make([]byte, 1)); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			url := serve(t, "127.0.0.1:0", func(v *visit) {
				v.request()
				v.say(ok)
				test.end(v)
			})
			r := run(t, load.Config{URL: url, KeepAlive: 1, Requests: 10})
			wantFailures(t, r, map[load.Kind]int64{load.Race: 5})
			if r.Connections != 5 || r.ClosedIdle.Count != 0 {
				t.Errorf("%d connections, %d closed while idle", r.Connections, r.ClosedIdle.Count)
			}
		})
	}
}

// A second response that is cut within is cut short, however often the connection answered before.
func TestCutOnReusedConnection(t *testing.T) {
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		v.request()
		v.say(ok)
		v.request()
		v.say(ok[:20])
	})
	r := run(t, load.Config{URL: url, KeepAlive: 1, Requests: 10})
	wantFailures(t, r, map[load.Kind]int64{load.CutShort: 5})
}

func TestClosedIdle(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(*visit)
		want int64
	}{
		{"end of file", func(v *visit) { v.CloseWrite() }, 1},
		{"status 408", func(v *visit) {
			v.say("HTTP/1.0 408 Request Timeout\r\nConnection: close\r\n\r\n")
			v.CloseWrite()
		}, 1},
		{"stray bytes", func(v *visit) { v.say("hello, anyone there?") }, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			noticed := make(chan struct{})
			url := serve(t, "127.0.0.1:0", func(v *visit) {
				v.request()
				v.say(ok)
				// The client's pause is endless: it closes only because it watches.
				test.end(v)
				v.awaitEnd()
				close(noticed)
			})
			r := runWith(t, t.Context(), load.Config{URL: url, KeepAlive: 1, Pause: time.Hour}, func(g *load.Generator) {
				<-noticed
				g.Stop()
			})
			if r.ClosedIdle.Count != test.want || r.Requests != 1 {
				t.Errorf("%d closed while idle, %d requests", r.ClosedIdle.Count, r.Requests)
			}
			if test.want == 1 {
				wantFailures(t, r, map[load.Kind]int64{})
			} else {
				wantFailures(t, r, map[load.Kind]int64{load.WrongAnswer: 1})
			}
		})
	}
}

func TestConnectionClose(t *testing.T) {
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		v.request()
		v.say("HTTP/1.1 200 OK\r\nConnection: Foo, Close\r\nContent-Length: 0\r\n\r\n")
		v.awaitEnd()
	})
	r := run(t, load.Config{URL: url, KeepAlive: 2, Requests: 10})
	wantFailures(t, r, map[load.Kind]int64{})
	if r.ConnectionClose != 10 || r.Connections != 10 || r.ClosedIdle.Count != 0 {
		t.Errorf("%d said close, %d connections, %d closed while idle", r.ConnectionClose, r.Connections, r.ClosedIdle.Count)
	}
}

func TestPipelined(t *testing.T) {
	for _, test := range []struct {
		name   string
		handle func(*visit) // of a connection that has four requests
		want   map[load.Kind]int64
	}{
		{"all answered", func(v *visit) {
			for v.request() {
				v.say(ok)
			}
		}, map[load.Kind]int64{}},
		{"closed after two", func(v *visit) {
			for range 4 {
				v.request()
			}
			v.say(ok + ok)
		}, map[load.Kind]int64{load.Race: 4}},
		{"cut within the third", func(v *visit) {
			for range 4 {
				v.request()
			}
			v.say(ok + ok + ok[:20])
		}, map[load.Kind]int64{load.CutShort: 2, load.Race: 2}},
		{"close announced after one", func(v *visit) {
			for range 4 {
				v.request()
			}
			v.say("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
		}, map[load.Kind]int64{load.Race: 6}},
		{"none answered", func(v *visit) {
			for range 4 {
				v.request()
			}
			v.reset()
		}, map[load.Kind]int64{load.Reset: 8}},
		{"one wrong", func(v *visit) {
			for i := 0; v.request(); i++ {
				v.say(strings.Replace(ok, "200", []string{"200", "404"}[i/2%2], 1))
			}
		}, map[load.Kind]int64{load.WrongAnswer: 4}},
	} {
		t.Run(test.name, func(t *testing.T) {
			url := serve(t, "127.0.0.1:0", test.handle)
			r := run(t, load.Config{URL: url, Pipelined: 1, Depth: 4, Requests: 8})
			wantFailures(t, r, test.want)
			if r.Requests != 8 {
				t.Errorf("%d requests", r.Requests)
			}
		})
	}
}

func TestSlowReader(t *testing.T) {
	const size = 1 << 20
	sent := make(chan int64, 1)
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		if err := v.SetWriteBuffer(64 << 10); err != nil {
			t.Error(err)
		}
		v.request()
		v.say(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size))
		n, _ := v.Write(make([]byte, size))
		sent <- int64(n)
	})
	t.Run("finishes", func(t *testing.T) {
		r := run(t, load.Config{URL: url, SlowReaders: 1, Requests: 1, SlowRate: 100 * size})
		wantFailures(t, r, map[load.Kind]int64{})
		if r.BytesReceived < size || r.Latency.SlowReader == nil {
			t.Errorf("%d bytes received, latency %v", r.BytesReceived, r.Latency)
		}
		<-sent
	})
	t.Run("given up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		r := runWith(t, ctx, load.Config{URL: url, SlowReaders: 1, Requests: 1, SlowRate: 1}, func(g *load.Generator) {
			for g.Snapshot().InFlight == 0 {
				runtime.Gosched()
			}
			cancel()
		})
		if r.Unfinished != 1 || r.Requests != 0 {
			t.Errorf("%d unfinished, %d requests", r.Unfinished, r.Requests)
		}
		if n := <-sent; n == size {
			t.Errorf("the server could send all of %d bytes to a reader of one byte a second", n)
		}
	})
}

// At the end, what is in flight is waited for, and the idle aren't.
func TestStopFinishes(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		v.request()
		if v.n == 0 {
			close(asked)
			<-answer
		}
		v.say(ok)
		v.awaitEnd()
	})
	r := runWith(t, t.Context(), load.Config{URL: url, KeepAlive: 1, Pause: time.Hour, Expect: "hello"}, func(g *load.Generator) {
		<-asked
		g.Stop()
		if s := g.Snapshot(); s.InFlight != 1 || s.Requests != 0 || s.LongestWait <= 0 {
			t.Errorf("while one waits: %+v", s)
		}
		close(answer)
	})
	wantFailures(t, r, map[load.Kind]int64{})
	if r.OK != 1 || r.Unfinished != 0 {
		t.Errorf("%d ok, %d unfinished", r.OK, r.Unfinished)
	}
}

func TestCancelGivesUp(t *testing.T) {
	asked := make(chan struct{}, 4)
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		v.request()
		asked <- struct{}{}
		v.awaitEnd()
	})
	before := openFiles(t)
	ctx, cancel := context.WithCancel(t.Context())
	r := runWith(t, ctx, load.Config{URL: url, OneRequest: 2, KeepAlive: 2}, func(*load.Generator) {
		for range 4 {
			<-asked
		}
		cancel()
	})
	wantFailures(t, r, map[load.Kind]int64{})
	if r.Unfinished != 4 || r.Requests != 0 {
		t.Errorf("%d unfinished, %d requests", r.Unfinished, r.Requests)
	}
	// The server's ends may still be open, but no other.
	if after := openFiles(t); after > before+4 {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

func TestDurationEnds(t *testing.T) {
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		for v.request() {
			v.say(ok)
		}
	})
	r := run(t, load.Config{
		URL: url, OneRequest: 2, KeepAlive: 2, Pipelined: 1, Pause: time.Millisecond, Duration: 100 * time.Millisecond,
	})
	wantFailures(t, r, map[load.Kind]int64{})
	for name, l := range map[string]*load.Latency{
		"one request": r.Latency.OneRequest, "kept alive": r.Latency.KeptAlive, "pipelined": r.Latency.Pipelined,
	} {
		if l == nil {
			t.Errorf("no latency of %s", name)
		} else if !slices.IsSorted([]float64{0, l.P50MS, l.P90MS, l.P99MS, l.P999MS, l.MaxMS}) || l.Count == 0 {
			t.Errorf("%s: %+v", name, l)
		}
	}
}

// A server that does what it likes keeps its own account of it; the report must be the same to the last request.
func TestCountsExactly(t *testing.T) {
	var did struct {
		sync.Mutex
		failures map[load.Kind]int64
		ok       int64
	}
	did.failures = map[load.Kind]int64{}
	// How to end, after a request was read, a connection that has given `before` answers.
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		for before := 0; v.request(); before++ {
			note := func(k load.Kind) {
				did.Lock()
				defer did.Unlock()
				did.failures[k]++
			}
			switch rand.IntN(10) {
			case 0:
				note(load.CutShort)
				v.say(ok[:1+rand.IntN(len(ok)-1)])
				return
			case 1:
				note(load.CutShort)
				v.say(ok[:1+rand.IntN(len(ok)-1)])
				v.reset()
				return
			case 2:
				if before > 0 {
					note(load.Race)
				} else {
					note(load.CutShort)
				}
				return
			case 3:
				if before > 0 {
					note(load.Race)
				} else {
					note(load.Reset)
				}
				v.reset()
				return
			case 4:
				note(load.WrongAnswer)
				v.say(strings.Replace(ok, "hello", "hullo", 1))
			case 5:
				note(load.WrongAnswer)
				v.say(strings.Replace(ok, "200", "503", 1))
			default:
				did.Lock()
				did.ok++
				did.Unlock()
				v.say(ok)
			}
		}
	})
	r := run(t, load.Config{URL: url, OneRequest: 4, KeepAlive: 4, Pipelined: 1, Depth: 1, Requests: 4000, Expect: "hello"})
	did.Lock()
	defer did.Unlock()
	wantFailures(t, r, did.failures)
	if r.OK != did.ok || r.Requests != 4000 {
		t.Errorf("%d ok of %d requests, the server counted %d", r.OK, r.Requests, did.ok)
	}
}

func TestSpread(t *testing.T) {
	var mu sync.Mutex
	from := map[string]bool{}
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		host, _, _ := net.SplitHostPort(v.RemoteAddr().String())
		mu.Lock()
		from[host] = true
		mu.Unlock()
		v.request()
		v.say(ok)
	})
	run(t, load.Config{URL: url, OneRequest: 2, Requests: 20})
	mu.Lock()
	defer mu.Unlock()
	if len(from) != 20 {
		t.Errorf("20 connections came from %d addresses: %v", len(from), from)
	}
	clear(from)
	mu.Unlock()
	run(t, load.Config{URL: url, OneRequest: 2, Requests: 20, NoSpread: true})
	mu.Lock()
	if len(from) != 1 || !from["127.0.0.1"] {
		t.Errorf("without spread, they came from %v", from)
	}
}

func TestIPv6(t *testing.T) {
	if l, err := net.Listen("tcp", "[::1]:0"); err != nil {
		t.Skip("no IPv6 here:", err)
	} else {
		l.Close()
	}
	url := serve(t, "[::1]:0", func(v *visit) { v.request(); v.say(ok) })
	r := run(t, load.Config{URL: url, OneRequest: 1, Requests: 3, Expect: "hello"})
	if r.OK != 3 || r.Spread {
		t.Errorf("%d ok, spread %v", r.OK, r.Spread)
	}
}

func TestHeader(t *testing.T) {
	var host, x, auth atomic.Value
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host.Store(r.Host)
		x.Store(r.Header.Get("X-Y"))
		user, password, _ := r.BasicAuth()
		auth.Store(user + ":" + password + r.URL.RequestURI())
	}))
	defer s.Close()
	r := run(t, load.Config{
		URL: strings.Replace(s.URL, "//", "//u:p@", 1) + "/a?b=c", OneRequest: 1, Requests: 1,
		Header: http.Header{"host": {"example.org"}, "x-y": {"z"}},
	})
	if r.OK != 1 || host.Load() != "example.org" || x.Load() != "z" || auth.Load() != "u:p/a?b=c" {
		t.Errorf("host %v, header %v, %v", host.Load(), x.Load(), auth.Load())
	}
	if strings.Contains(r.URL, "u:p") {
		t.Errorf("the report holds the password: %s", r.URL)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, test := range []struct {
		config load.Config
		want   string
	}{
		{load.Config{OneRequest: 1}, "no URL"},
		{load.Config{URL: "http://127.0.0.1:80"}, "no clients"},
		{load.Config{URL: "https://127.0.0.1", OneRequest: 1}, "https"},
		{load.Config{URL: "unix:///run/x", OneRequest: 1}, "scheme unix"},
		{load.Config{URL: "127.0.0.1:x", OneRequest: 1}, "not a URL"},
		{load.Config{URL: "127.0.0.1:70000", OneRequest: 1}, "out of range"},
		{load.Config{URL: ":80", OneRequest: -1}, "one-request clients can't be negative"},
		{load.Config{URL: ":80", KeepAlive: 1, Pause: -1}, "pause can't be negative"},
		{load.Config{URL: ":80", KeepAlive: 1, Duration: -1}, "duration can't be negative"},
		{load.Config{URL: ":80", Pipelined: 1, Depth: 1e6}, "at most"},
		{load.Config{URL: ":80", KeepAlive: 1, Header: http.Header{"a b": {"c"}}}, "can't be the name"},
		{load.Config{URL: ":80", KeepAlive: 1, Header: http.Header{"A": {"b\r\nC: d"}}}, "can't be the value"},
	} {
		if _, err := load.New(test.config); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want …%s…", test.config, err, test.want)
		}
	}
}

func TestRunsOnce(t *testing.T) {
	url := serve(t, "127.0.0.1:0", func(v *visit) { v.request(); v.say(ok) })
	g, err := load.New(load.Config{URL: url, OneRequest: 1})
	if err != nil {
		t.Fatal(err)
	}
	if s := g.Snapshot(); s != (load.Snapshot{}) {
		t.Errorf("before the run: %+v", s)
	}
	g.Stop()
	if r, err := g.Run(t.Context()); err != nil || r.Requests != 0 {
		t.Errorf("stopped before it ran: %v, %v", r, err)
	}
	if _, err := g.Run(t.Context()); err == nil {
		t.Error("it ran twice")
	}
}

func TestReportJSON(t *testing.T) {
	url := serve(t, "127.0.0.1:0", func(v *visit) {
		v.request()
		if v.n > 0 {
			v.say(ok)
		}
	})
	r := run(t, load.Config{URL: url, OneRequest: 1, Requests: 3})
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b, []byte(`"cut_short":{"count":1,"first":[{"at_ms":`)) {
		t.Errorf("%s", b)
	}
	var back load.Report
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(&back, r) {
		t.Errorf("back from JSON:\n%+v\nwant\n%+v", &back, r)
	}
}

func Example() {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "hello")
	}))
	defer server.Close()

	g, err := load.New(load.Config{
		URL:        server.URL,
		OneRequest: 2,
		KeepAlive:  1,
		Pause:      time.Millisecond,
		Requests:   100,
		Expect:     "hello",
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	report, err := g.Run(context.Background())
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(report.OK, "ok,", report.Failed, "failed,", report.Failures[load.Refused].Count, "refused")
	// Output: 100 ok, 0 failed, 0 refused
}
