package drain

import (
	"time"

	"github.com/berth-net/berth/sockdiag"
)

// A connection of the generation, as long as there is something to wait for.
type connection struct {
	id     sockdiag.ID
	inode  uint32
	state  sockdiag.State
	holder holder

	seenIn    int           // the last sweep that found it
	firstSeen time.Duration // all times are of CLOCK_MONOTONIC
	next      time.Duration // when to look at it again

	counters counters
	activity Activity      // at the last look
	ordered  bool          // the Order knows it
	mistrust time.Duration // the last payload in after which the Order was found wrong

	idle    bool          // nothing was in flight at the last look
	asked   bool          // its program was made to read an end of file
	askedAt time.Duration // when
}

// outlook judges by the Order where it knows the connection, by counters elsewhere.
func (c *connection) outlook(quiet, rhythm time.Duration) outlook {
	var o outlook
	if c.ordered {
		o = c.activity.outlook(quiet, rhythm)
	} else {
		o = c.counters.outlook(quiet, rhythm)
	}
	switch c.state {
	case sockdiag.Established:
	case sockdiag.CloseWait:
		// The client has said that it sends no more, but it may still wait for a response. A program that has answered and
		// doesn't close has forgotten the connection.
		o.patience = max(o.patience, Silence)
	default:
		// The program has sent its FIN and keeps the connection to read what is left: a lingering close.
		o = outlook{phase: inFlight, since: o.since}
	}
	return o
}

// gap is the longest gap seen in its responses lately.
func (c *connection) gap() time.Duration {
	if c.ordered {
		return c.activity.Gap
	}
	return max(c.counters.gap, c.counters.gapNow)
}
