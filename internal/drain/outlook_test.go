package drain

import (
	"testing"
	"time"
)

const ms = time.Millisecond

func TestOutlook(t *testing.T) {
	const now = 10 * time.Second
	answer := func(ago, gap time.Duration, responses uint32, open bool) outlook {
		a := Activity{LastIn: now - ago - ms, LastOut: now - ago, Gap: gap, Responses: responses, Open: open}
		return a.outlook(DefaultQuiet, 20*ms)
	}
	for _, tt := range []struct {
		name        string
		o           outlook
		idle, quiet bool
	}{
		{"request in flight", Activity{LastIn: now - time.Hour, LastOut: now - 2*time.Hour}.outlook(DefaultQuiet, 0), false, false},
		{"just answered", answer(ms, 0, 99, false), false, false},
		{"at the beginning of a pause", answer(3*ms, 0, 99, false), true, true},
		{"later in a pause", answer(8*ms, 0, 99, false), false, true},
		{"long idle", answer(300*ms, 0, 99, false), true, true},
		{"in a stream's rhythm", answer(30*ms, 20*ms, 99, false), false, false},
		{"after a stream", answer(41*ms, 20*ms, 99, false), true, true},
		{"young, in a generation that streams", answer(30*ms, 0, 1, false), false, false},
		{"young, after a stream's rhythm", answer(41*ms, 0, 1, false), true, true},
		{"between two chunks", answer(500*ms, 0, 99, true), false, false},
		{"after the last chunk", Activity{LastIn: now - 50*ms, LastOut: now - 3*ms, Gap: 20 * ms, Complete: true}.outlook(DefaultQuiet, 20*ms), true, true},
		{"no more chunks came", answer(1100*ms, 0, 99, true), true, true},
		{"silent", outlook{phase: silent, since: now - Silence/2}, false, false},
		{"silent for long", outlook{phase: silent, since: now - Silence}, true, true},
		{"unsure", outlook{phase: unsure, since: now - Silence/2, patience: ms}, false, false},
		{"answered, but when isn't known", outlook{phase: answered, since: now - 3*ms, earliest: now - 9*ms, patience: 2 * ms}, false, true},
	} {
		if idle, again := tt.o.idle(now); idle != tt.idle || again > now+pollEvery {
			t.Errorf("%s: idle %v, look again in %v; want %v", tt.name, idle, again-now, tt.idle)
		}
		if quiet := tt.o.quiet(now); quiet != tt.quiet {
			t.Errorf("%s: quiet %v, want %v", tt.name, quiet, tt.quiet)
		}
	}
}
