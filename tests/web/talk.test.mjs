/** A conversation: asked, forked, edited and found again. The real server and model. */

import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, grown, launch, openPage } from './browser.mjs'
import { startServer } from './server.mjs'

let browser
let server

before(async () => {
  browser = await launch()
  server = await startServer('--max-sessions', '2')
})
after(async () => {
  await browser?.close()
  await server?.stop()
})

const button = (page, name) => page.getByRole('button', { name, exact: true })
const idle = (page) => page.locator('.talk form .primary', { hasText: 'Send' }).waitFor()
const answers = (page) => page.getByRole('article', { name: 'Answer' })
const said = (page) => answers(page).last().locator('.said')
const STORY = 'Tell me a short story about a fox.'

async function open(options) {
  const page = await openPage(browser, `${server.url}/#conversation`, options)
  await page.getByText('Ask, and see').waitFor()
  return page
}

async function limit(page, tokens) {
  await page.getByLabel('max tokens', { exact: true }).fill(String(tokens))
}

async function ask(page, text) {
  const before = await answers(page).count()
  await page.getByLabel('Message', { exact: true }).fill(text)
  await page.keyboard.press('Enter')
  await answers(page).nth(before).waitFor()
}

test('a conversation by keyboard alone: ask, take another word, ask on, edit the question, go back', async () => {
  const page = await open()
  await assertAccessible(page, 'a new conversation')
  await limit(page, 24)
  await page.keyboard.press('Tab')
  await page.getByLabel('Message', { exact: true }).focus()
  await page.keyboard.type(STORY)
  await page.keyboard.press('Enter')
  await page.locator('.fork').first().waitFor()
  await assertAccessible(page, 'an answer that grows')
  await idle(page)
  assert.equal(await page.getByRole('tree').count(), 0, 'there is no map of a straight line')
  const first = await said(page).innerText()
  assert.match(page.url(), /#conversation=web-/)

  const fork = page.locator('.fork').nth(1)
  const word = await fork.innerText()
  await fork.focus()
  await page.keyboard.press('Enter')
  await page.keyboard.press('ArrowDown')
  const other = await page.locator('.fork-card .word').nth(1).innerText()
  await page.keyboard.press('Enter')
  await page.getByText('2/2', { exact: true }).waitFor()
  await idle(page)
  const second = await said(page).innerText()
  assert.ok(second.startsWith(first.slice(0, first.indexOf(word)) + other), `${second} has ${other} for ${word}`)
  assert.ok(
    await answers(page).evaluate((element) => element === document.activeElement),
    'the new answer has the focus',
  )

  await page.keyboard.press('[')
  assert.equal(await said(page).innerText(), first)
  await page.keyboard.press(']')
  assert.equal(await said(page).innerText(), second)

  const [request] = await Promise.all([page.waitForRequest(/\/sessions$/), ask(page, 'What was its name?')])
  const told = request.postDataJSON().messages
  assert.deepEqual(told.map(({ role }) => role), ['user', 'assistant', 'user']) // prettier-ignore
  assert.equal(told[1].content, second)
  await idle(page)
  await page.getByLabel('Message', { exact: true }).blur()
  await page.keyboard.press('e')
  await page.getByLabel('Your question, edited').fill('Where did it live?')
  await assertAccessible(page, 'a question being edited')
  await page.keyboard.press('Enter')
  await page.getByRole('group', { name: 'Questions in this place' }).getByText('2/2').waitFor()
  await idle(page)
  await page.keyboard.press('Shift+Tab') // from the answer back to its question
  await page.keyboard.press('[')
  await page.getByText('What was its name?').waitFor()
  await assertAccessible(page, 'a conversation with branches')

  const tree = page.getByRole('tree', { name: 'All that was said' })
  assert.equal(await tree.getByRole('treeitem').count(), 7)
  const focused = () => page.evaluate(() => document.activeElement.ariaLabel)
  await tree.locator('[tabindex="0"]').focus()
  await page.keyboard.press('ArrowUp')
  assert.equal(await focused(), 'You: What was its name?')
  await page.keyboard.press('ArrowRight')
  assert.equal(await focused(), 'You: Where did it live?')
  await page.keyboard.press('Enter')
  const question = page.getByRole('article', { name: 'You asked' }).last()
  await question.getByText('Where did it live?').waitFor()
  const marked = tree.locator('[aria-selected="true"]')
  assert.equal(await marked.count(), 4)
  await page.keyboard.press('ArrowUp')
  await page.keyboard.press('ArrowLeft')
  await page.keyboard.press('Enter')
  await question.getByText(STORY).waitFor()
  assert.equal(await said(page).innerText(), first)
  assert.equal(await marked.count(), 2)
  await closePage(page)
})

test('another answer is another reading each time, until there is none; what draws takes another seed', async () => {
  const page = await open()
  await limit(page, 8)
  await ask(page, STORY)
  await idle(page)
  const texts = [await said(page).innerText()]
  for (let count = 2; count < 4; count++) {
    await button(page, 'Another answer').click()
    await page.getByText(`${count}/${count}`, { exact: true }).waitFor()
    await idle(page)
    texts.push(await said(page).innerText())
  }
  assert.equal(new Set(texts).size, 3, texts.join(' | '))
  await page.getByRole('radio', { name: 'Greedy' }).click()
  await button(page, 'Another answer').click()
  await page.getByText('4/4', { exact: true }).waitFor()
  await idle(page)
  const [request] = await Promise.all([page.waitForRequest(/\/sessions$/), button(page, 'Another answer').click()])
  assert.equal(request.postDataJSON().seed, 42 + 4)
  await page.getByText('It says the same again').waitFor()
  await page.getByText('4/4', { exact: true }).waitFor()
  await page.getByRole('radio', { name: 'Branches' }).click()
  await button(page, 'Another answer').click()
  await page.getByText(/^5\/(?!5)\d$/).waitFor() // the texts of one run stand in each other's place
  await idle(page)
  await closePage(page)
})

test('an answer is stopped, kept and gone on with; a reload in the middle goes on by itself', async () => {
  const page = await open()
  await limit(page, 100)
  await ask(page, STORY)
  await grown(page, 'tokens', 2)
  await page.keyboard.press('Escape')
  await page.getByText('stopped', { exact: true }).waitFor()
  const before = await said(page).innerText()
  await button(page, 'Go on').click()
  await grown(page, 'tokens', 2)
  await page.reload()
  await page.getByText('reached its length', { exact: true }).waitFor()
  await idle(page)
  const whole = await said(page).innerText()
  assert.ok(whole.startsWith(before.slice(0, 12)), `${whole} begins with ${before}`)
  await button(page, 'Lattice').click()
  await page.getByRole('region', { name: /^Lattice/ }).waitFor()
  await assertAccessible(page, 'an answer and its lattice')
  await page.locator('.stack').first().click()
  await button(page, 'Look into it').first().click()
  await page.getByRole('complementary').getByText('Where it comes from').waitFor()
  await assertAccessible(page, 'a member of an answer')
  await button(page, 'Open this answer as a text').click()
  await page.getByText('100 steps', { exact: true }).waitFor()
  await page.goBack()
  await answers(page).waitFor()
  assert.equal(await said(page).innerText(), whole)
  await closePage(page)
})

test('a word is taken in an answer whose session is gone, and in one that a restarted server never held', async (t) => {
  const own = await startServer()
  t.after(() => own.stop())
  const page = await openPage(browser, `${own.url}/#conversation`, { expected: [/404|410|ERR_|Failed to load/] })
  await page.getByText('Ask, and see').waitFor()
  await limit(page, 100)
  await ask(page, STORY)
  await grown(page, 'tokens', 9)
  own.kill()
  await page.getByRole('alert').waitFor()
  await page.getByText('cut off', { exact: true }).waitFor()
  const again = await startServer('--port', new URL(own.url).port)
  t.after(again.stop)
  await page.getByText('cut off', { exact: true }).waitFor({ state: 'detached' }) // it goes on by itself
  await idle(page)
  assert.equal(await page.getByRole('alert').count(), 0)
  await button(page, 'Lattice').click()
  await page.locator('.stack').first().click()
  await page.locator('.fork-card:popover-open .main').nth(1).click()
  await page.getByText('2/2', { exact: true }).waitFor()
  await idle(page)
  assert.equal(await page.getByRole('alert').count(), 0)
  await closePage(page)
})

test('conversations are listed, named, searched by what was said, and deleted; each is there again', async () => {
  const page = await open()
  await limit(page, 6)
  await page.getByText(/^System prompt/).click()
  await page.getByLabel('System prompt').fill('You are a pirate.')
  const [request] = await Promise.all([page.waitForRequest(/\/sessions$/), ask(page, 'Who are you?')])
  assert.deepEqual(request.postDataJSON().messages[0], { role: 'system', content: 'You are a pirate.' })
  await idle(page)
  const text = await said(page).innerText()
  await button(page, 'New').click()
  await page.getByText('Ask, and see').waitFor()
  await ask(page, STORY)
  await idle(page)

  const list = page.locator('.list')
  await button(page, 'Rename Who are you?').click()
  await page.keyboard.type('A pirate')
  await assertAccessible(page, 'naming a conversation')
  await page.keyboard.press('Enter')
  await list.getByText('A pirate').waitFor()
  await page.getByLabel('Search your conversations').fill(text.slice(0, 16))
  await list.getByText(STORY.slice(0, 20)).waitFor({ state: 'detached' })
  await list.getByText('A pirate').click()
  await page.getByRole('article', { name: 'You asked' }).getByText('Who are you?').waitFor()
  assert.equal(await said(page).innerText(), text)
  await page.evaluate(() => sessionStorage.clear()) // a tab of another day
  const address = page.url()
  await page.goto('about:blank')
  await page.goto(address)
  await page.getByText('You are a pirate.').waitFor()
  assert.equal(await said(page).innerText(), text)

  page.on('dialog', (dialog) => void dialog.accept())
  await button(page, 'Delete A pirate').click()
  await page.getByText('Ask, and see').waitFor()
  assert.equal(await list.getByText('A pirate').count(), 0)
  await list.getByText(STORY.slice(0, 20)).click()
  await button(page, 'Delete this question').click()
  await answers(page).waitFor({ state: 'detached' })
  await page.reload()
  await page.getByText('Ask, and see').waitFor()
  await closePage(page)
})

test('a conversation fits a phone, light and dark', async () => {
  for (const colorScheme of ['light', 'dark']) {
    const page = await open({ viewport: { width: 380, height: 760 }, colorScheme })
    await assertFits(page, 'a new conversation at 380 px')
    await button(page, 'Why is the sky blue?').click()
    await page.locator('.fork').first().waitFor()
    await button(page, 'Stop').click()
    await idle(page)
    await assertFits(page, 'an answer at 380 px')
    await assertAccessible(page, `an answer at 380 px, ${colorScheme}`)
    const bar = await page.locator('.top').boundingBox()
    assert.ok(bar.height < 50, `the top bar is ${bar.height} px high`)
    const composer = await page.getByLabel('Message', { exact: true }).boundingBox()
    assert.ok(composer.y + composer.height <= 760, 'one can ask on without scrolling')
    await page.locator('.fork').first().click()
    await page.locator('.fork-card').waitFor()
    await assertFits(page, 'a fork of an answer at 380 px')
    await closePage(page)
  }
})
