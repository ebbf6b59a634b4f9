package load

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// A Report is what came of a run. Times are in milliseconds, whole to the microsecond.
type Report struct {
	URL string `json:"url"`

	// Target is the address and port that all connections went to.
	Target string `json:"target"`

	// Spread says that they came from many addresses of 127.0.0.0/8.
	Spread bool `json:"spread"`

	ElapsedMS float64 `json:"elapsed_ms"`

	// Requests have ended: OK of them with a whole, right response, and Failed of them in one of the ways in Failures.
	Requests int64 `json:"requests"`
	OK       int64 `json:"ok"`
	Failed   int64 `json:"failed"`

	// Unfinished requests were given up because the run was cancelled. They are in no other number.
	Unfinished int64 `json:"unfinished"`

	// Failures has every kind, also those that didn't happen.
	Failures map[Kind]Tally `json:"failures"`

	// Connections were made.
	Connections int64 `json:"connections"`

	// ClosedIdle connections were ended by the server while nothing was in flight, which is no failure.
	ClosedIdle Tally `json:"closed_idle"`

	// ConnectionClose is the number of responses with Connection: close. An HTTP/1.1 body that only the close ends
	// says the same, and counts.
	ConnectionClose int64 `json:"connection_close"`

	BytesReceived int64 `json:"bytes_received"`

	// RequestsPerSecond counts those that ended well.
	RequestsPerSecond float64 `json:"requests_per_second"`

	// Latency is of requests that ended well. LongestWaitMS is of all requests, but for slow readers'.
	Latency       Latencies `json:"latency"`
	LongestWaitMS float64   `json:"longest_wait_ms"`
}

// A Tally counts events of one kind.
type Tally struct {
	Count int64 `json:"count"`

	// First are the first few, LastMS the time of the last one.
	First  []Event `json:"first,omitempty"`
	LastMS float64 `json:"last_ms,omitempty"`

	// Names counts those of [Other] by the name of their errno.
	Names map[string]int64 `json:"names,omitempty"`
}

// An Event is a time since the start of the run, and what happened then.
type Event struct {
	AtMS float64 `json:"at_ms"`
	Text string  `json:"text"`
}

// Latencies are one for each sort of client, nil for a sort none of whose requests ended well. A request's begins
// when its client wants to send it, so it includes connecting where the client had no connection, and it ends with
// the response's last byte; a slow reader's ends with the first.
type Latencies struct {
	OneRequest *Latency `json:"one_request,omitempty"`
	KeptAlive  *Latency `json:"kept_alive,omitempty"`
	Pipelined  *Latency `json:"pipelined,omitempty"`
	SlowReader *Latency `json:"slow_reader,omitempty"`
}

// A Latency is a distribution, with three significant digits; the maximum is exact.
type Latency struct {
	Count  int64   `json:"count"`
	P50MS  float64 `json:"p50_ms"`
	P90MS  float64 `json:"p90_ms"`
	P99MS  float64 `json:"p99_ms"`
	P999MS float64 `json:"p99_9_ms"`
	MaxMS  float64 `json:"max_ms"`
}

func (g *Generator) report(elapsed time.Duration) *Report {
	c := &g.counts
	r := &Report{
		URL:             g.url.Redacted(),
		Target:          g.target.String(),
		Spread:          g.spread != nil,
		ElapsedMS:       ms(elapsed),
		Requests:        c.requests.Load(),
		Failed:          c.failed.Load(),
		Unfinished:      c.unfinished.Load(),
		Failures:        make(map[Kind]Tally, kinds),
		Connections:     c.connections.Load(),
		ClosedIdle:      c.closedIdle.report(),
		ConnectionClose: c.connectionClose.Load(),
		BytesReceived:   c.bytes.Load(),
		Latency: Latencies{
			OneRequest: c.waits[oneRequest].report(),
			KeptAlive:  c.waits[keptAlive].report(),
			Pipelined:  c.waits[pipelined].report(),
			SlowReader: c.waits[slowReader].report(),
		},
		LongestWaitMS: ms(time.Duration(c.longest.Load())),
	}
	for k := range kinds {
		r.Failures[k] = c.failures[k].report()
	}
	r.OK = r.Requests - r.Failed
	r.RequestsPerSecond = float64(r.OK) / elapsed.Seconds()
	return r
}

// WriteText writes the report for people.
func (r *Report) WriteText(w io.Writer) error {
	_, err := io.WriteString(w, r.String())
	return err
}

// String returns the report as people read it. Counts that are 0 and mean nothing bad are left out.
func (r *Report) String() string {
	var b strings.Builder
	elapsed := time.Duration(r.ElapsedMS * float64(time.Millisecond)).Round(10 * time.Millisecond)
	fmt.Fprintf(&b, "%s requests in %v, %s a second, to %s\n",
		count(r.Requests), elapsed, count(int64(r.RequestsPerSecond)), r.URL)
	r.writeCounts(&b)
	if r.Latency != (Latencies{}) {
		r.writeLatencies(&b)
	}
	for k := range kinds {
		f := r.Failures[k]
		if f.Count == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n%s: %s%s, the last one after %s\n", k, count(f.Count), names(f.Names), seconds(f.LastMS))
		for _, e := range f.First {
			fmt.Fprintf(&b, "  after %s: %s\n", seconds(e.AtMS), e.Text)
		}
	}
	return b.String()
}

func (r *Report) writeCounts(b *strings.Builder) {
	t := newTable(b)
	defer t.Flush()
	row := func(name string, n int64, always bool) {
		if n != 0 || always {
			fmt.Fprintf(t, "%s\t%s\t\n", pad(name), count(n))
		}
	}
	row("ok", r.OK, true)
	row("failed", r.Failed, true)
	for k := range kinds {
		row("  "+k.String(), r.Failures[k].Count, false)
	}
	row("unfinished", r.Unfinished, false)
	row("connections", r.Connections, true)
	row("closed while idle", r.ClosedIdle.Count, false)
	row("Connection: close", r.ConnectionClose, false)
	fmt.Fprintf(t, "%s\t%s\t\n", pad("received"), size(r.BytesReceived))
	fmt.Fprintf(t, "%s\t%s ms\t\n", pad("longest wait"), millis(r.LongestWaitMS))
}

func (r *Report) writeLatencies(b *strings.Builder) {
	t := newTable(b)
	defer t.Flush()
	fmt.Fprintf(t, "\n%s\tp50\tp90\tp99\tp99.9\tmax\t\n", pad("latency, ms"))
	for _, l := range []struct {
		name string
		*Latency
	}{
		{"one request", r.Latency.OneRequest}, {"kept alive", r.Latency.KeptAlive},
		{"pipelined", r.Latency.Pipelined}, {"slow, first byte", r.Latency.SlowReader},
	} {
		if l.Latency != nil {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t\n", pad("  "+l.name),
				millis(l.P50MS), millis(l.P90MS), millis(l.P99MS), millis(l.P999MS), millis(l.MaxMS))
		}
	}
}

func newTable(b *strings.Builder) *tabwriter.Writer {
	return tabwriter.NewWriter(b, 0, 0, 2, ' ', tabwriter.AlignRight)
}

// pad makes names one column, aligned to the left.
func pad(name string) string { return fmt.Sprintf("%-18s", name) }

func names(n map[string]int64) string {
	if len(n) == 0 {
		return ""
	}
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(n)) {
		parts = append(parts, name+" "+count(n[name]))
	}
	return " (" + strings.Join(parts, ", ") + ")"
}

// count writes 1234567 as 1,234,567.
func count(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func millis(ms float64) string {
	switch {
	case ms < 10:
		return strconv.FormatFloat(ms, 'f', 2, 64)
	case ms < 1000:
		return strconv.FormatFloat(ms, 'f', 1, 64)
	}
	return count(int64(ms))
}

func seconds(ms float64) string { return strconv.FormatFloat(ms/1000, 'f', 3, 64) + " s" }

func size(n int64) string {
	v, unit := float64(n), 0
	for v >= 1024 && unit < 4 {
		v /= 1024
		unit++
	}
	if unit == 0 {
		return count(n) + " bytes"
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGT"[unit-1])
}
