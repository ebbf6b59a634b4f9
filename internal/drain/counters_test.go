package drain

import (
	"testing"
	"time"

	"github.com/berth-net/berth/sockdiag"
)

// A peer plays one end of a connection as its counters show it.
type peer struct{ sockdiag.Socket }

func newPeer() *peer {
	p := new(peer)
	p.Info.SendMSS = 1448
	return p
}

// request comes in and acknowledges all that was sent.
func (p *peer) request() {
	p.Info.BytesReceived += 100
	p.Info.DataSegsIn++
	p.acknowledge()
	p.Info.LastDataReceived = 0
}

func (p *peer) respond() {
	p.Info.BytesSent += 50
	p.Info.DataSegsOut++
	p.Info.Unacked++
	p.Info.LastDataSent = 0
}

func (p *peer) acknowledge() {
	p.Info.BytesAcked = p.Info.BytesSent
	p.Info.Unacked = 0
}

func TestCounters(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps []func(*peer) // a look after each
		want  phase
	}{
		{"nothing yet", []func(*peer){func(p *peer) {}}, silent},
		{"server speaks first", []func(*peer){func(p *peer) { p.respond() }}, silent},
		{"request alone", []func(*peer){(*peer).request}, inFlight},
		{"request, then response", []func(*peer){(*peer).request, (*peer).respond}, answered},
		{"both before the first look, unacknowledged", []func(*peer){func(p *peer) { p.request(); p.respond() }}, answered},
		{"both before the first look, acknowledged", []func(*peer){func(p *peer) { p.request(); p.respond(); p.acknowledge() }}, unsure},
		{"acknowledged alone later", []func(*peer){func(p *peer) { p.request(); p.respond(); p.acknowledge(); p.Info.BytesAcked-- }, (*peer).acknowledge}, answered},
		{"another tick", []func(*peer){func(p *peer) { p.request(); p.respond(); p.acknowledge(); p.Info.LastDataReceived = 4 * ms }}, answered},
		{"answered, then one request and its response", []func(*peer){(*peer).request, (*peer).respond,
			func(p *peer) { p.request(); p.respond(); p.acknowledge() }}, answered},
		{"a client without a pause: the response, then the next request", []func(*peer){(*peer).request,
			func(p *peer) { p.respond(); p.request() }}, unsure},
		{"the same for ever", []func(*peer){(*peer).request, func(p *peer) { p.respond(); p.request() },
			func(p *peer) { p.respond(); p.request() }, func(p *peer) { p.respond(); p.request() }}, unsure},
		{"a request, its response and the next request", []func(*peer){(*peer).request, (*peer).respond,
			func(p *peer) { p.request(); p.respond(); p.request() }}, unsure},
		{"unread", []func(*peer){(*peer).request, func(p *peer) { p.respond(); p.RecvQueue = 3 }}, inFlight},
		{"held back by TCP", []func(*peer){(*peer).request, func(p *peer) { p.respond(); p.Info.Unsent = 6 }}, inFlight},
	} {
		var c counters
		p, now := newPeer(), time.Second
		for _, step := range tt.steps {
			step(p)
			now += ms
			c.look(now, &p.Socket)
		}
		if c.phase != tt.want {
			t.Errorf("%s: phase %d, want %d", tt.name, c.phase, tt.want)
		}
	}
}

func TestCountersLearnTheRhythm(t *testing.T) {
	var c counters
	p, now := newPeer(), time.Second
	look := func(after time.Duration, step func()) {
		if step != nil {
			step()
		}
		now += after
		c.look(now, &p.Socket)
	}
	look(ms, p.request)
	look(ms, p.respond)
	look(20*ms, p.respond)
	if o := c.outlook(DefaultQuiet, 0); o.patience != 40*ms || o.phase != answered {
		t.Errorf("within a stream: %+v", o)
	}
	look(ms, p.request) // a pause before it isn't a gap
	look(300*ms, p.respond)
	if o := c.outlook(DefaultQuiet, 0); o.patience != 40*ms {
		t.Errorf("after a slow handler: patience %v, want 40ms", o.patience)
	}
	for range 30 {
		look(10*ms, p.request)
		look(ms, p.respond)
	}
	if o := c.outlook(DefaultQuiet, 0); o.patience > 2*DefaultQuiet {
		t.Errorf("patience is still %v after 30 responses in one piece", o.patience)
	}
	// TCP's own pause isn't the handler's.
	look(10*ms, p.request)
	look(ms, func() { p.respond(); p.Info.Unsent = 6 })
	look(40*ms, func() { p.Info.Unsent = 0; p.acknowledge(); p.respond() })
	if o := c.outlook(DefaultQuiet, 0); o.patience > 2*DefaultQuiet || o.phase != answered {
		t.Errorf("after Nagle's pause: %+v", o)
	}
}
