/** Debian's Chromium, driven by playwright-core; a page that reports an error or breaks its policy fails its test. */

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'

export const ROOT = fileURLToPath(new URL('../..', import.meta.url))
export const WEB = `${ROOT}tempo_mlx/server/web/`
const require = createRequire(`${WEB}package.json`)
const { chromium } = require('playwright-core')
const AXE = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8')

const FLAGS =
  '--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run'

export function launch() {
  return chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: FLAGS.split(' ') })
}

/** `expected`: errors that the test provokes, as patterns. */
export async function openPage(browser, url, { expected = [], ...options } = {}) {
  const context = await browser.newContext({
    viewport: { width: 1280, height: 900 },
    acceptDownloads: true,
    ...options,
  })
  await context.grantPermissions(['clipboard-read', 'clipboard-write']).catch(() => undefined)
  const page = await context.newPage()
  page.setDefaultTimeout(Number(process.env.PAGE_TIMEOUT ?? 120_000))
  page.wrong = []
  const note = (text) => {
    if (!expected.some((pattern) => pattern.test(text))) page.wrong.push(text)
  }
  page.on('pageerror', (error) => note(String(error)))
  page.on('console', (message) => {
    if (message.type() === 'error') note(message.text())
  })
  if (url) await page.goto(url)
  return page
}

export async function closePage(page) {
  const { wrong } = page
  await page.context().close()
  assert.deepEqual(wrong, [], 'the page reported errors')
}

/** WCAG A and AA as far as a machine can tell. */
export async function assertAccessible(page, what) {
  await page.evaluate(AXE)
  const { violations } = await page.evaluate(() =>
    globalThis.axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa'] }),
  )
  const listed = violations.map(
    (v) => `${v.impact} ${v.id}: ${v.nodes.map((n) => `${n.target} ${n.failureSummary}`).join(' | ')}`,
  )
  assert.deepEqual(listed, [], `${what}: axe finds violations`)
}

/** At least so many steps, or tokens: a fast machine may be past any one number before it is looked for. */
export const grown = (page, what, least) => page.getByText(new RegExp(`^([${least}-9]|\\d{2,}) ${what}$`)).waitFor()

export async function assertFits(page, what) {
  const [content, view] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth])
  assert.ok(content <= view, `${what}: ${content} px of content in ${view} px`)
}

/** What the page's main thread has worked, in milliseconds of the CPU's: what else the machine does counts for nothing. */
export async function meter(page) {
  const client = await page.context().newCDPSession(page)
  await client.send('Performance.enable', { timeDomain: 'threadTicks' })
  return async (name) => {
    const { metrics } = await client.send('Performance.getMetrics')
    return 1000 * metrics.find((m) => m.name === name).value
  }
}

/** Drop a file with this text onto the page. */
export async function drop(page, name, content) {
  const data = await page.evaluateHandle(
    ([name, content]) => {
      const data = new DataTransfer()
      data.items.add(new File([content], name, { type: 'application/json' }))
      return data
    },
    [name, content],
  )
  await page.dispatchEvent('body', 'drop', { dataTransfer: data })
}
