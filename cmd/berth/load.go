package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/berth-net/berth/internal/load"
	"github.com/berth-net/berth/internal/sys"
)

// A loadUsageError is a load that was asked for and can't be made.
type loadUsageError struct {
	error
	hint string
}

func (e loadUsageError) Unwrap() error { return e.error }
func (e loadUsageError) Hint() string  { return e.hint }
func (loadUsageError) ExitCode() int   { return 2 }

// A loadFailedError says that the load ran, and met failures.
type loadFailedError struct{ failed, requests int64 }

func (e loadFailedError) Error() string {
	return fmt.Sprintf("%s of %s requests failed", grouped(e.failed), grouped(e.requests))
}
func (loadFailedError) ExitCode() int { return 1 }

func newLoadCommand() *cobra.Command {
	var (
		config  load.Config
		headers []string
		asJSON  bool
	)
	cmd := &cobra.Command{
		Use:   "load URL",
		Short: "Put HTTP load on a server and count every failure by its kind",
		Long: `Put HTTP load on a server and count every failure by its kind.

Restart, scale or kill your server meanwhile: what it cost its clients is in the
report. A request is tried once. These failures are told apart: refused, reset,
cut short, timed out, wrong answer, met a close (a request on a kept-alive
connection that the server was closing), other. A server may close a connection
with nothing in flight on it: that is counted as closed while idle, and is no
failure.

Ctrl-C ends the load and waits for the requests in flight; a second one doesn't
wait. The report comes either way.

Connections to 127.0.0.0/8 come from many addresses of it, because one address
runs out of ports within seconds: see --no-spread.

Exit status: 0 no failure, 1 any failure, 2 wrong usage.`,
		Example: `  berth load :8080                                  # 10 s, a mix of clients
  berth load :8080 --duration 1m --expect hello     # a body must hold this text
  berth load :8080 --clients 0 --keep-alive 50 --pause 0
  berth load http://[::1]:8080/slow --clients 0 --keep-alive 0 --slow 10
  berth load :8080 --requests 1000 --json | jq .failures.reset.count`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return loadUsageError{
					fmt.Errorf("%d URLs given, want one", len(args)), "berth load http://127.0.0.1:8080/",
				}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			config.URL = args[0]
			if err := boundLoad(cmd, &config); err != nil {
				return err
			}
			var err error
			if config.Header, err = parseHeaders(headers); err != nil {
				return err
			}
			g, err := load.New(config)
			if err != nil {
				return loadUsageError{error: err, hint: "berth load --help shows examples"}
			}
			report, err := runLoad(cmd.Context(), g, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				err = e.Encode(report)
			} else {
				err = report.WriteText(cmd.OutOrStdout())
			}
			if err != nil {
				return err
			}
			if report.Failed > 0 {
				return loadFailedError{failed: report.Failed, requests: report.Requests}
			}
			return nil
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return loadUsageError{err, "berth load --help shows the flags"}
	})
	f := cmd.Flags()
	f.IntVar(&config.OneRequest, "clients", 12, "clients that connect, send one request and close")
	f.DurationVar(&config.PauseBetween, "pause-between", 0, "pause of those clients, and of slow ones, between connections")
	f.IntVar(&config.KeepAlive, "keep-alive", 4, "clients that keep their connection")
	f.DurationVar(&config.Pause, "pause", 100*time.Millisecond, "pause of kept-alive and pipelined clients between requests")
	f.IntVar(&config.Pipelined, "pipelined", 0, "clients that keep their connection and have several requests in flight on it")
	f.IntVar(&config.Depth, "depth", load.DefaultDepth, "requests in flight of a pipelined client")
	f.IntVar(&config.SlowReaders, "slow", 0, "clients that connect, send one request and read slowly")
	f.IntVar(&config.SlowRate, "slow-rate", load.DefaultSlowRate, "`bytes` a second that a slow client reads")
	f.DurationVar(&config.Duration, "duration", load.DefaultDuration, "end after this time; no limit if only --requests is given")
	f.Int64Var(&config.Requests, "requests", 0, "end after as many requests; 0 is no limit")
	f.DurationVar(&config.Timeout, "timeout", load.DefaultTimeout, "a request takes no longer, from connecting to the last byte")
	f.DurationVar(&config.Backoff, "backoff", load.DefaultBackoff, "pause of a client that could not connect")
	f.StringVar(&config.Expect, "expect", "", "`text` that the body of each response must hold")
	f.StringArrayVar(&headers, "header", nil, "header to send, as `\"Name: value\"`; can be repeated")
	f.BoolVar(&config.NoSpread, "no-spread", false, "connect from one address, also over loopback")
	f.BoolVar(&asJSON, "json", false, "report in JSON")
	return cmd
}

// boundLoad makes flags that were given as 0 mean what they say, and refuses those that leave the run without an end.
func boundLoad(cmd *cobra.Command, c *load.Config) error {
	given := cmd.Flags().Changed
	if c.Requests > 0 && !given("duration") {
		c.Duration = 0
	}
	if c.Requests == 0 && c.Duration == 0 {
		return loadUsageError{errors.New("a load without an end"), "give --duration or --requests"}
	}
	for name, zero := range map[string]bool{"depth": c.Depth == 0, "slow-rate": c.SlowRate == 0, "timeout": c.Timeout == 0} {
		if zero {
			return loadUsageError{fmt.Errorf("--%s can't be 0", name), "leave it out for the default"}
		}
	}
	if c.Backoff == 0 {
		c.Backoff = -1
	}
	return nil
}

func parseHeaders(lines []string) (http.Header, error) {
	h := http.Header{}
	for _, line := range lines {
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return nil, loadUsageError{fmt.Errorf("header %q has no colon", line), `--header "Name: value"`}
		}
		h.Add(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	return h, nil
}

// runLoad runs the load until it is over or interrupted, with a line on how it goes if stderr is a terminal.
func runLoad(ctx context.Context, g *load.Generator, stderr io.Writer) (*load.Report, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan struct{})
	var beside sync.WaitGroup
	// In this order: what runs beside ends before it is waited for.
	defer beside.Wait()
	defer close(over)

	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	beside.Go(func() {
		for _, end := range []func(){g.Stop, cancel} {
			select {
			case <-signals:
				end()
			case <-over:
				return
			}
		}
	})
	if f, ok := stderr.(*os.File); ok && sys.IsTerminal(f) {
		beside.Go(func() { showProgress(g, f, over) })
	}
	return g.Run(ctx)
}

// showProgress keeps one line up to date, and erases it at the end.
func showProgress(g *load.Generator, w io.Writer, over <-chan struct{}) {
	const erase = "\r\x1b[K"
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-over:
			fmt.Fprint(w, erase)
			return
		}
		s := g.Snapshot()
		fmt.Fprintf(w, "%s%3.0f s  %s requests  %s/s  %s failed  longest wait %v", erase, s.Elapsed.Seconds(),
			grouped(s.Requests), grouped(int64(s.Rate)), grouped(s.Failed), s.LongestWait.Round(100*time.Microsecond))
	}
}

// grouped writes 1234567 as 1,234,567.
func grouped(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
