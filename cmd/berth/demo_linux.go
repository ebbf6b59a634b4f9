package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/berth-net/berth/internal/control"
	"github.com/berth-net/berth/internal/load"
	"github.com/berth-net/berth/internal/sys"
)

// demoRestarts is how often each server is restarted.
const demoRestarts = 10

func newDemoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See it: a server restarted ten times under load, with and without berth",
		Long: `Restart a small HTTP server ten times under load, first the usual way (stop it, start it again), then the same server behind
berth, and show what the clients met. It takes less than half a minute, uses a free port of 127.0.0.1, and leaves nothing behind.

The exit status is 1 if a request failed behind berth.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return runDemo(ctx, cmd.OutOrStdout())
		},
	}
	cmd.AddCommand(&cobra.Command{
		Use: "server ADDR", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return failed(demoServer(args[0]), "") },
	})
	return cmd
}

// demoServer knows nothing of restarts: SIGTERM ends it wherever it is, as it does most programs.
func demoServer(addr string) error {
	return http.ListenAndServe(addr, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(2 * time.Millisecond) // some work, so that requests are in flight
		fmt.Fprintf(w, "hello from pid %d\n", os.Getpid())
	}))
}

func runDemo(ctx context.Context, out io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return failed(err, "")
	}
	addr, err := freeAddress()
	if err != nil {
		return failed(err, "")
	}
	fmt.Fprintf(out, "A small HTTP server on %s, restarted %d times under load: 12 clients that connect for each request,\n4 that keep their connection.\n\n", addr, demoRestarts)
	usual, err := demoRow(ctx, out, "the usual way", addr, &usualServer{self: self, addr: addr})
	if err != nil {
		return err
	}
	behind, err := demoRow(ctx, out, "behind berth", addr, &berthServer{self: self, addr: addr})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%-16s %10s %9s %9s %9s %11s %9s %13s\n", "", "requests", "refused", "reset", "cut", "met a close", "other", "longest wait")
	for _, row := range []struct {
		name string
		r    *load.Report
	}{{"the usual way", usual}, {"behind berth", behind}} {
		f := func(kinds ...load.Kind) (n int64) {
			for _, k := range kinds {
				n += row.r.Failures[k].Count
			}
			return n
		}
		fmt.Fprintf(out, "%-16s %10d %9d %9d %9d %11d %9d %10.0f ms\n", row.name, row.r.Requests, f(load.Refused), f(load.Reset), f(load.CutShort),
			f(load.Race), f(load.TimedOut, load.WrongAnswer, load.Other), row.r.LongestWaitMS)
	}
	if behind.Failed > 0 {
		return failed(fmt.Errorf("%d requests failed behind berth", behind.Failed), "please report it, with the lines above")
	}
	return nil
}

// freeAddress is an address of this machine that nobody listens on now.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// restartable is a server in one of the demo's rows.
type restartable interface {
	start(ctx context.Context) error
	restart(ctx context.Context) error
	stop()
}

// demoRow puts load on a server and restarts it meanwhile.
func demoRow(ctx context.Context, out io.Writer, name, addr string, server restartable) (*load.Report, error) {
	if err := server.start(ctx); err != nil {
		server.stop()
		return nil, failed(fmt.Errorf("%s: %w", name, err), "")
	}
	defer server.stop()
	g, err := load.New(load.Config{URL: "http://" + addr + "/", OneRequest: 12, KeepAlive: 4, Pause: 50 * time.Millisecond, Duration: time.Minute, Expect: "hello"})
	if err != nil {
		return nil, failed(err, "")
	}
	type outcome struct {
		report *load.Report
		err    error
	}
	ended := make(chan outcome, 1)
	go func() {
		r, err := g.Run(ctx)
		ended <- outcome{r, err}
	}()
	live := newLiveLine(out, func(restarts int) string {
		s := g.Snapshot()
		return fmt.Sprintf("%-16s restart %2d of %d   %8d requests, %6d a second   %6d failed", name, restarts, demoRestarts, s.Requests, int(s.Rate), s.Failed)
	})
	// Ten restarts need a little load before, between and after them.
	between := func() error { return pause(ctx, 400*time.Millisecond) }
	err = between()
	for i := 1; i <= demoRestarts && err == nil; i++ {
		if err = server.restart(ctx); err == nil {
			live.step(i)
			err = between()
		}
	}
	g.Stop()
	o := <-ended
	live.end()
	if err == nil {
		err = o.err
	}
	if err != nil {
		return nil, failed(fmt.Errorf("%s: %w", name, err), "")
	}
	return o.report, nil
}

// liveLine redraws one line on a terminal, and prints a line a step elsewhere.
type liveLine struct {
	out   io.Writer
	text  func(step int) string
	live  bool
	steps chan int
	done  chan struct{}
}

func newLiveLine(out io.Writer, text func(step int) string) *liveLine {
	f, ok := out.(*os.File)
	l := &liveLine{out: out, text: text, live: ok && sys.IsTerminal(f), steps: make(chan int), done: make(chan struct{})}
	go func() {
		defer close(l.done)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		step := 0
		for {
			select {
			case n, ok := <-l.steps:
				if !ok {
					if l.live {
						fmt.Fprintf(out, "\r\x1b[K%s\n", text(step))
					}
					return
				}
				if step = n; !l.live {
					fmt.Fprintln(out, text(step))
				}
			case <-tick.C:
				if l.live {
					fmt.Fprintf(out, "\r\x1b[K%s", text(step))
				}
			}
		}
	}()
	return l
}

func (l *liveLine) step(n int) { l.steps <- n }

func (l *liveLine) end() {
	close(l.steps)
	<-l.done
}

// usualServer is stopped and started again, as service managers do it.
type usualServer struct {
	self, addr string
	cmd        *exec.Cmd
}

func (u *usualServer) start(ctx context.Context) error {
	u.cmd = exec.Command(u.self, "demo", "server", u.addr)
	u.cmd.Stderr = os.Stderr
	if err := u.cmd.Start(); err != nil {
		return err
	}
	for {
		c, err := net.Dial("tcp", u.addr)
		if err == nil {
			return c.Close()
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return err
		}
	}
}

func (u *usualServer) restart(ctx context.Context) error {
	u.stop()
	return u.start(ctx)
}

func (u *usualServer) stop() {
	if u.cmd == nil || u.cmd.Process == nil {
		return
	}
	_ = u.cmd.Process.Signal(syscall.SIGTERM)
	_ = u.cmd.Wait()
}

// berthServer is the same server behind berth run.
type berthServer struct {
	self, addr string
	dir        string
	cmd        *exec.Cmd
	log        bytes.Buffer
	client     *control.Client
	exited     chan struct{}
}

func (b *berthServer) start(ctx context.Context) error {
	var err error
	if b.dir, err = os.MkdirTemp("", "berth-demo-"); err != nil {
		return err
	}
	path := filepath.Join(b.dir, "demo.sock")
	b.cmd = exec.Command(b.self, "run", "--name", "demo", "--control", path, "--listen", b.addr, "--", b.self, "demo", "server", b.addr)
	b.cmd.Stdout, b.cmd.Stderr = &b.log, &b.log
	if err := b.cmd.Start(); err != nil {
		return err
	}
	b.exited = make(chan struct{})
	go func() {
		_ = b.cmd.Wait()
		close(b.exited)
	}()
	// The port is open from the first moment; the control socket says that it is.
	for {
		if b.client, err = control.Dial(path); err == nil {
			st, err := b.client.Status(ctx)
			if err == nil && len(st.Ledger) > 0 {
				return nil
			}
		}
		select {
		case <-b.exited:
			return errors.New("berth run ended: " + strings.TrimSpace(b.log.String()))
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (b *berthServer) restart(ctx context.Context) error {
	e, err := b.client.Restart(ctx, control.RestartRequest{})
	if err == nil && e.Error != "" {
		err = errors.New(e.String())
	}
	return err
}

func (b *berthServer) stop() {
	if b.exited != nil {
		_ = b.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-b.exited:
		case <-time.After(20 * time.Second):
			_ = b.cmd.Process.Kill()
			<-b.exited
		}
	}
	if b.dir != "" {
		os.RemoveAll(b.dir)
	}
}
