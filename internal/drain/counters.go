package drain

import (
	"time"

	"github.com/berth-net/berth/sockdiag"
)

// learning is how long connections are only watched at first where counters must do: their rhythm isn't known yet.
const learning = 100 * time.Millisecond

// tick is the longest time between two ticks of a kernel's clock.
const tick = 10 * time.Millisecond

// Counters judge a connection by what changes from one look to the next. In between, a request may arrive and be answered, or a response may leave
// and the next request arrive: the same counters move. What tells one from the other:
//
//   - A client acknowledges what it has got with whatever it sends. While the last response is unacknowledged, no request has
//     followed it.
//   - An ACK for new data that comes alone says the same.
//   - If the last request was answered, and one segment came in and something went out, then that is one request and its response.
//   - The times of the last segments in and out, in ticks of 1 to 10 ms, if they differ.
//
// If none does, the connection may have a request in flight.
type counters struct {
	looked bool
	last   sockdiag.TCPInfo
	phase  phase

	lookedAt    time.Duration // last look
	movedAt     time.Duration // look that saw the last payload
	movedAfter  time.Duration // look before that one
	sentAt      time.Duration // last payload of the present response that was seen to leave
	held        bool          // TCP had payload to send at the last look
	gap, gapNow time.Duration // as in an Order's value
	many        bool          // many small segments out for each one in: a stream
}

// look takes in what a connection's counters show now.
func (c *counters) look(now time.Duration, s *sockdiag.Socket) {
	i := &s.Info
	received := i.BytesReceived - c.last.BytesReceived
	sent := (i.BytesSent - i.BytesRetrans) - (c.last.BytesSent - c.last.BytesRetrans)
	acked := i.BytesAcked > c.last.BytesAcked
	segments := i.DataSegsIn - c.last.DataSegsIn
	unacknowledged := i.Unacked > 0

	switch {
	case i.BytesReceived == 0:
		c.phase = silent
		if !c.looked {
			c.movedAt = now
		}
	case !c.looked:
		c.movedAt = now - min(i.LastDataSent, i.LastDataReceived)
		c.movedAfter = c.movedAt - tick
		switch {
		case i.BytesSent == 0:
			c.phase = inFlight
		case unacknowledged:
			c.phase = answered
		default:
			c.phase = byTicks(i)
		}
	case received > 0 && sent > 0:
		switch {
		case unacknowledged, c.phase == answered && segments == 1:
			c.phase = answered
		default:
			c.phase = byTicks(i)
		}
	case received > 0:
		c.phase = inFlight
	case sent > 0:
		c.phase = answered
	case acked && c.phase == unsure:
		c.phase = answered
	}

	if received > 0 {
		c.gap, c.gapNow = max(c.gap-c.gap>>fadeShift, c.gapNow), 0
		c.sentAt = 0
	} else if sent > 0 && c.sentAt > 0 && !c.held {
		c.gapNow = max(c.gapNow, now-c.sentAt)
	}
	if sent > 0 && c.looked {
		c.sentAt = now
	}
	if c.looked && received+sent > 0 {
		c.movedAt, c.movedAfter = now, c.lookedAt
	}
	c.lookedAt = now
	if s.RecvQueue > 0 || i.Unsent > 0 {
		c.phase = inFlight
	}
	c.held = i.Unsent > 0
	segmentsOut := uint64(i.DataSegsOut)
	c.many = segmentsOut > 3*uint64(i.DataSegsIn) && i.BytesSent < segmentsOut*uint64(i.SendMSS)/2
	c.last, c.looked = *i, true
}

// byTicks compares when the last segments came and went.
func byTicks(i *sockdiag.TCPInfo) phase {
	switch {
	case i.LastDataSent < i.LastDataReceived:
		return answered
	case i.LastDataSent > i.LastDataReceived:
		return inFlight
	}
	return unsure
}

// outlook judges by the counters.
func (c *counters) outlook(quiet, rhythm time.Duration) outlook {
	// The look before is a poll earlier at best; that much can't be helped.
	patience := max(quiet, 2*max(c.gap, c.gapNow), 2*min(rhythm, rhythmCap))
	if c.many {
		patience = max(patience, Silence)
	}
	return outlook{phase: c.phase, since: c.movedAt, earliest: c.movedAfter + pollEvery, patience: patience}
}
