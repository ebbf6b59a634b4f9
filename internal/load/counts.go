package load

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/berth-net/berth/internal/sys"
)

// samples is how many of a tally's events are kept in words.
const samples = 3

// counts is what clients add to while they run.
type counts struct {
	requests        atomic.Int64 // ended, well or badly
	failed          atomic.Int64
	unfinished      atomic.Int64
	connections     atomic.Int64
	connectionClose atomic.Int64
	bytes           atomic.Int64
	longest         atomic.Int64 // wait, in ns, of all ended requests but slow readers'
	longestLately   atomic.Int64 // the same, since the last Snapshot

	failures   [kinds]tally
	closedIdle tally
	waits      [roles]waits
}

func (c *counts) init(timeout time.Duration) {
	for i := range c.waits {
		c.waits[i].limit = max(2*timeout, time.Minute).Microseconds()
	}
}

// waited notes how long a request took, whatever its end.
func (c *counts) waited(d time.Duration) {
	raise(&c.longest, int64(d))
	raise(&c.longestLately, int64(d))
}

func raise(v *atomic.Int64, to int64) {
	for {
		is := v.Load()
		if to <= is || v.CompareAndSwap(is, to) {
			return
		}
	}
}

// A tally counts one kind of event and keeps the first few.
type tally struct {
	n atomic.Int64

	mu    sync.Mutex // guards what follows, not n
	first []Event
	last  time.Duration
	names map[string]int64
}

// add counts an event at a time since the run's start. A named one is counted by its errno's name too.
func (t *tally) add(at time.Duration, err error, named bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.n.Add(1)
	t.last = max(t.last, at)
	if len(t.first) < samples {
		t.first = append(t.first, Event{AtMS: ms(at), Text: err.Error()})
	}
	if named {
		name := sys.ErrnoName(err)
		if name == "" {
			name = err.Error()
		}
		if t.names == nil {
			t.names = make(map[string]int64)
		}
		t.names[name]++
	}
}

func (t *tally) report() Tally {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Tally{Count: t.n.Load(), First: t.first, LastMS: ms(t.last), Names: t.names}
}

// waits holds the waits of one sort of client. Its histogram is made when the first is added.
type waits struct {
	mu    sync.Mutex // guards all but limit
	limit int64      // µs; what is longer counts as this long in the percentiles
	h     *hdrhistogram.Histogram
	max   time.Duration
}

func (w *waits) add(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.h == nil {
		w.h = hdrhistogram.New(1, w.limit, 3)
	}
	w.max = max(w.max, d)
	// Can't fail: the value is in the histogram's range.
	_ = w.h.RecordValue(min(max(d.Microseconds(), 1), w.limit))
}

// report returns nil when nothing was added.
func (w *waits) report() *Latency {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.h == nil {
		return nil
	}
	longest := ms(w.max)
	// The histogram rounds up within its precision; a percentile is never above the true maximum.
	at := func(q float64) float64 { return min(float64(w.h.ValueAtQuantile(q))/1000, longest) }
	return &Latency{
		Count: w.h.TotalCount(), P50MS: at(50), P90MS: at(90), P99MS: at(99), P999MS: at(99.9), MaxMS: longest,
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
